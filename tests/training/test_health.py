"""A gradient that breaks, spikes or vanishes is noticed; so is a loss that trains nothing."""

import dataclasses
import json
import math

import pytest
import torch

import runs
from flowback import AlignmentConfig, Flow, checkpoint
from flowback.alignment.align import Noised
from flowback.training import train_loop
from flowback.training.monitoring import Guard, block_statistics, sums_by_level, vanished
from flowback.training.trainer import BadGradientError

CPU = torch.device("cpu")


def verdicts(guard, norms):
    return [int(guard.judge(torch.tensor(norm), step)) for step, norm in enumerate(norms, start=1)]


def test_only_non_finite_norms_are_bad_without_a_spike_rule():
    guard = Guard(None, CPU)
    assert verdicts(guard, [1.0, float("nan"), 1e30, float("inf"), 2.0]) == [0, 1, 0, 1, 0]
    assert int(guard.bad) == 2
    assert int(guard.last) == 4


def test_a_spike_is_judged_against_the_mean_of_the_good_steps():
    guard = Guard(10.0, CPU)
    assert verdicts(guard, [1.0, 9.0, 100.0, 100.0, 5.0]) == [0, 0, 1, 1, 0]
    # 0.98 · (0.98 · 1 + 0.02 · 9) + 0.02 · 5, the spikes left out.
    assert float(guard.typical) == pytest.approx(0.98 * (0.98 + 0.18) + 0.1)


def test_a_norm_of_exactly_zero_is_bad_and_a_small_one_is_not():
    guard = Guard(10.0, CPU)
    assert verdicts(guard, [0.0, 1.0, 0.0, 1e-30, 1.0]) == [1, 0, 1, 0, 0]
    assert int(guard.bad) == 2
    assert float(guard.typical) == pytest.approx(0.98 * (0.98 + 0.02e-30) + 0.02)


@pytest.mark.parametrize(
    ("norms", "reason"),
    [
        ([1.0, float("nan")], "is not finite"),
        ([1.0, float("inf"), 0.0], r"is exactly 0 (NaN replaced by 0?)"),
        ([2.0, 50.0, 2.0], "spikes (its norm is 50, the running mean 2)"),
    ],
)
def test_the_reason_of_the_last_bad_step(norms, reason):
    guard = Guard(10.0, CPU)
    verdicts(guard, norms)
    assert guard.reason() == reason


def test_the_tally_survives_a_checkpoint():
    guard, other = Guard(10.0, CPU), Guard(10.0, CPU)
    verdicts(guard, [1.0, 100.0])
    other.load_state_dict(guard.state_dict())
    assert verdicts(other, [100.0]) == [1]
    assert int(other.bad) == 2


def test_block_statistics_of_a_fresh_flow(config):
    """Output weights start at zero: a block scales all tokens but its first by exp(-bias)."""
    flow = Flow(config.model)
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    images = torch.randn(2, 1, 8, 8)
    found = block_statistics(flow, Noised(images))
    assert found["z2_1"] == pytest.approx(float(images.square().mean()))
    assert found["log_scale_max_2"] == found["log_scale_min_2"] == 0
    torch.nn.init.constant_(flow.blocks[1].proj_out.bias, -0.5)
    found = block_statistics(flow, Noised(images))
    assert found["log_scale_min_2"] == -0.5
    assert found["z2_2"] > found["z2_1"]


class Features:
    """Targets of one value in every dimension."""

    dim = 6
    originals = None

    def __init__(self, value=1.0):
        self.value = value

    def __call__(self, indices, flipped, seen):
        return torch.full((len(seen), 4, 6), self.value)


def aligned(config, **train):
    alignment = AlignmentConfig(strategy="detach", locations=((2, 1),), hidden=8)
    train = dataclasses.replace(config.train, **train)
    return dataclasses.replace(config, alignment=alignment, train=train)


def break_likelihood(monkeypatch):
    """Densities that depend on no weight, as where NaN was masked."""
    forward = Flow.forward

    def broken(self, *arguments, **named):
        out = forward(self, *arguments, **named)
        return dataclasses.replace(out, z=out.z * 0, log_det=out.log_det * 0)

    monkeypatch.setattr(Flow, "forward", broken)


def test_a_likelihood_that_vanishes_stops_the_run(config, digits, tmp_path, monkeypatch):
    """Its value is that of z = 0; no gradient is left."""
    break_likelihood(monkeypatch)
    with pytest.raises(BadGradientError, match=r"Step 1: the gradient is exactly 0 .*bad-steps\.jsonl"):
        train_loop(config, digits, tmp_path)
    (evidence,) = map(json.loads, (tmp_path / "bad-steps.jsonl").read_text().splitlines())
    assert evidence["grad_norm"] == 0
    assert not checkpoint.step_folders(tmp_path)


def test_steps_without_a_gradient_are_counted_and_leave_the_weights_alone(
    config, digits, tmp_path, monkeypatch, caplog
):
    break_likelihood(monkeypatch)
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, bad_steps=None))
    row = train_loop(few, digits, tmp_path)
    assert row["bad_steps"] == 12
    assert row["grad_norm"] == 0
    assert "Step 12 was skipped: its gradient is exactly 0 (NaN replaced by 0?) (12 bad steps" in caplog.text
    state = checkpoint.load_training_state(checkpoint.resolve(tmp_path))["objective"]
    torch.manual_seed(0)
    fresh = Flow(config.model).state_dict()
    assert all(torch.equal(state[f"flow.{name}"], value) for name, value in fresh.items())


def test_features_that_are_all_zero_are_named_once(config, digits, tmp_path, caplog):
    """The likelihood trains on: the gradient as a whole is healthy."""
    row = train_loop(aligned(config), digits, tmp_path, Features(0.0))
    assert (row["step"], row["bad_steps"], row["alignment"]) == (12, 0, 0)
    (warning,) = [message for message in caplog.messages if "trains nothing" in message]
    assert warning.startswith("Step 4: The alignment trains nothing at cosine_2_1, which is exactly 0")
    assert "look at the encoder's features" in warning


def test_a_projector_that_no_longer_answers_is_named(config, digits, tmp_path, monkeypatch, caplog):
    """Its cosine is not 0, but that of a constant; the comparison of gradients sees it."""
    from flowback.alignment.loss import Projector

    forward = Projector.forward
    monkeypatch.setattr(
        Projector, "forward", lambda self, hidden: forward(self, hidden) * 0 + self.layers[-1].bias
    )
    row = train_loop(aligned(config, diagnose_every=4), digits, tmp_path, Features())
    assert row["alignment"] != 0
    (warning,) = [message for message in caplog.messages if "exactly 0" in message]
    assert warning.startswith(
        "Step 4: The gradient of alignment is exactly 0 in all blocks; look at the proj"
    )


def test_a_healthy_run_warns_of_nothing(config, digits, tmp_path, caplog):
    caplog.set_level("WARNING", "flowback")  # which the command line sets to INFO in other tests
    train_loop(aligned(config, diagnose_every=4), digits, tmp_path, runs.RandomTargets())
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"nll": 0.0}, ["likelihood (nll) is exactly 0"]),
        ({"nll": 1.0, "cosine_1_2": 0.1, "cosine_3_4": 0.0}, ["nothing at cosine_3_4,"]),
        ({"cosine_1_2": float("nan"), "cosine_3_4": 0.0}, ["nothing at cosine_1_2, cosine_3_4,"]),
        ({"grad_nll_1": 0.0, "grad_nll_2": 0.0, "grad_alignment_1": 0.5}, ["gradient of nll is exactly 0"]),
        ({"grad_nll_1": 0.1, "grad_alignment_1": 0.0, "grad_alignment_2": 0.1, "nll": -1e-9}, []),
    ],
)
def test_what_vanished(row, words):
    found = vanished(row)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_sums_by_level_by_hand(config):
    """A third of all levels in each part; what is not finite stays there."""
    model = dataclasses.replace(config.model, noise="range", noise_min=0.1, noise_max=0.4)
    levels = torch.tensor([0.1, 0.15, 0.25, 0.35, 0.4])
    values = torch.tensor([1.0, 2.0, 3.0, math.nan, 5.0]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    found = sums_by_level(levels, values, dataclasses.replace(config, model=model))
    expected = torch.tensor([[2, 3, 0.3], [1, 3, 0.3], [2, math.nan, 0.9]])
    torch.testing.assert_close(found, expected, equal_nan=True)
    square = dataclasses.replace(config.train, levels="square")  # its thirds end at 0.245 and 0.332
    found = sums_by_level(levels - 0.01, (), dataclasses.replace(config, model=model, train=square))
    assert found[:, 0].tolist() == [3, 0, 2]
