"""What tests run in two processes that share one flow."""

from __future__ import annotations

import copy
import os
import signal

import runs


class Targets(runs.RandomTargets):
    """Features of the images; at one step NaN, and at another a signal, both in the last process alone.

    Args:
        calls: how often a step asks for features.
        nan: step, counted from 1; 0 for none.
        stop: step of SIGTERM, likewise.
    """

    def __init__(self, calls: int, nan: int = 0, stop: int = 0) -> None:
        self.calls, self.nan, self.stop, self.count = calls, nan, stop, 0

    def __call__(self, indices, flipped, seen):
        features = super().__call__(indices, flipped, seen)
        step, call = divmod(self.count, self.calls)
        self.count += 1
        if os.environ.get("RANK", "1") == "1":
            if step + 1 == self.nan:
                features = features * float("nan")
            if step + 1 == self.stop and call == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return features


def held_out(step, flow):
    """Of an evaluator: a figure of the averaged flow on some images."""
    import torch

    images = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8)
    return {"nll_held_out": float(-flow.log_prob(images, torch.arange(4)).mean() / 64)}


def launched(config, out, evaluator) -> int:
    """Train as processes of `accelerate launch --use_fsdp --fsdp_version 2`."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return runs.training(config, out, targets=Targets(2), evaluators=[evaluator])


def keeps(config) -> int:
    """Whether a state that was gathered, and scattered over weights of another seed, is the same again.

    Of weights, moments and averages that all differ, since steps this late do not shorten the averages.
    """
    import dataclasses

    import torch
    from accelerate import Accelerator
    from torch.utils._pytree import tree_leaves

    from flowback.config import TrainConfig
    from flowback.training import start
    from flowback.training.state import Weights

    state = start(TrainConfig(device="cpu"))
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    one, two = (Weights(c, 6, Accelerator(cpu=True), sharded=True) for c in (config, other))
    for step in (10**4, 10**4 + 1):
        generator = torch.Generator().manual_seed(step + state.process_index)
        batch = torch.randn(4, 1, 8, 8, generator=generator), torch.arange(4), None, torch.ones(4, 4, 6)
        one.model(*batch).loss.backward()
        one.gradient_norm()
        one.step(step, bad=torch.zeros(()))
    training, averages = one.state(keep=True)
    two.restore(training, dict(zip(config.train.averages, averages, strict=True)))
    before, after = map(tree_leaves, ((training, averages), two.state(keep=True)))
    same = [a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after, strict=True)]
    name = "blocks.0.proj_in.weight"
    different = [training["objective"][f"flow.{name}"], *(average[name] for average in averages)]
    print("kept", all(same), len({float(value.norm()) for value in different}))  # noqa: T201
    return 0


def gradients(*configs) -> int:
    """Of each config, gradients of a sharded objective against those of a plain one, in float64.

    Two processes with two parts of the batch each, against the whole batch; far from the identity. Prints
    which blocks' Transformers are whole between forward and backward, and the largest error in units of the
    largest gradient.
    """
    import torch
    from torch import nn

    from flowback.alignment.loss import alignment_weights
    from flowback.config import TrainConfig
    from flowback.nn.transformer import Transformer
    from flowback.training import start
    from flowback.training.distributed import gathered, shard
    from flowback.training.objective import Objective
    from flowback.training.state import set_up_bodies

    Transformer.compile = lambda body: nn.Module.compile(body, backend="aot_eager")  # no compiler, no wait
    state = start(TrainConfig(device="cpu"))
    for config in configs:
        torch.manual_seed(0)
        plain = Objective(config, 6 if config.alignment.active else None).double()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        objective = copy.deepcopy(plain)
        shard(objective, state.device)
        set_up_bodies(objective.bodies, config)
        batch = (
            torch.randn(8, 1, 8, 8).double(),
            torch.arange(8),
            torch.arange(8) < 3,
            torch.randn(8, 4, 6).double(),
        )
        more = {}
        if config.model.noise == "range":
            more["levels"] = torch.linspace(config.model.noise_min, config.model.noise_max, 8).double()
            more["alignment_weights"] = alignment_weights(more["levels"], config.alignment)
        plain(*batch, **more).loss.backward()
        for part in torch.arange(8).chunk(2)[state.process_index].chunk(2):
            losses = objective(
                *(values[part] for values in batch), **{name: values[part] for name, values in more.items()}
            )
            whole = [
                type(p) is nn.Parameter
                for p in (b.body.layers[0].mlp.up.weight for b in objective.flow.blocks)
            ]
            (losses.loss / 2).backward()
        found = gathered({name: parameter.grad for name, parameter in objective.named_parameters()})
        wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
        error = max(float((found[name] - value).abs().max()) for name, value in wanted.items())
        print(*map(int, whole), error / max(float(value.abs().max()) for value in wanted.values()))  # noqa: T201
    return 0


def checks(kept, *configs) -> int:
    """Both of the above."""
    return keeps(kept) or gradients(*configs)
