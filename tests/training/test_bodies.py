import dataclasses

import pytest
import torch
from torch import nn

import runs
from flowback import InputError
from flowback.config import AlignmentConfig
from flowback.training import train_loop
from flowback.training.objective import Objective
from flowback.training.state import set_up_bodies

STRATEGIES = ("none", "forward", "detach", "reverse", "reverse-literal")


def settings(strategy, **train):
    """The tiny run with two layers, the first of which is aligned, too."""
    config = runs.tiny_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layers=2),
        alignment=AlignmentConfig(strategy=strategy, order="exact", locations=((1, 1), (2, 2)), hidden=8),
        train=dataclasses.replace(config.train, **train),
    )


def gradients(config):
    """Of all parameters, on one batch, far from the identity."""
    torch.manual_seed(0)
    objective = Objective(config, 6 if config.alignment.active else None)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    set_up_bodies(objective.bodies, config)
    images, targets = torch.randn(4, 1, 8, 8), torch.randn(4, 4, 6)
    objective(images, torch.arange(4), None, targets).loss.backward()
    return {name: parameter.grad for name, parameter in objective.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpointing_changes_no_bit_of_a_gradient(strategy, precision, monkeypatch):
    plain = gradients(settings(strategy, precision=precision))
    calls, forward = [], nn.Module.__call__

    def count(self, *arguments, **named):
        calls.append(type(self).__name__)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(nn.Module, "__call__", count)
    checkpointed = gradients(settings(strategy, precision=precision, checkpoint_activations=True))
    assert calls.count("Layer") >= 2 * 4  # each of the four at least twice
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.parametrize("strategy", ["none", "reverse"])
def test_compiled_bodies_give_the_same_run_but_for_rounding(strategy, digits, targets, tmp_path):
    """In a process of its own: the tests' checks of shapes cannot be traced."""
    train_loop(settings(strategy), digits, tmp_path / "eager", targets)
    job, log = settings(strategy, compile=True), tmp_path / "log"
    assert runs.run(runs.compiled, job, tmp_path / "compiled", log=log) == [0], runs.printed(log)
    assert int(runs.printed(log).splitlines()[-1]) > 0
    runs.assert_near(tmp_path / "eager", tmp_path / "compiled")


def test_no_compiler_here(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"--train\.compile needs a C\+\+ compiler"):
        gradients(settings("none", compile=True))
