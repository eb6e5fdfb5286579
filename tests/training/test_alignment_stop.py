"""Alignment that stops or fades while the flow is trained on (HASTE, arXiv 2505.16792)."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest

import runs
from flowback.alignment.align import weight_at
from flowback.config import AlignmentConfig
from flowback.training import Evaluator, train_loop


def aligned(config, **options):
    """12 steps in which blocks 1 and 2 are aligned, a look every 2."""
    return dataclasses.replace(
        config,
        alignment=AlignmentConfig(
            **{"strategy": "reverse", "order": 1, "locations": ((1, 1), (2, 1)), "hidden": 8, **options}
        ),
        train=dataclasses.replace(config.train, log_every=2, diagnose_every=2),
    )


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Counted(runs.RandomTargets):
    """Targets that count how often they are asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *batch):
        self.calls += 1
        return super().__call__(*batch)


@pytest.mark.parametrize(
    ("options", "last"), [({"stop_at": 6}, 0.1), ({"stop_at": 6, "decay": "linear"}, 0.1 / 6)]
)
def test_from_the_step_on_nothing_is_aligned(config, digits, tmp_path, options, last):
    """6 steps ask for targets, and the looks at steps 2 and 4; the weight of a row is the next step's."""
    targets = Counted()
    train_loop(aligned(config, **options), digits, tmp_path, targets)
    assert targets.calls == 6 + 2
    weights = {row["step"]: row["alignment_weight"] for row in rows(tmp_path)}
    assert weights[4] == pytest.approx(0.1 if "decay" not in options else 0.1 / 3)
    assert (weights[6], weights[12]) == (0, 0)
    assert "alignment" in rows(tmp_path)[2]  # of step 6, the last that was aligned
    assert all("alignment" not in row for row in rows(tmp_path)[3:])
    assert weight_at(AlignmentConfig(strategy="reverse", **options), 5) == pytest.approx(last)


def test_stopped_at_once_it_is_likelihood_training(config, digits, tmp_path):
    """The flow's losses, bit for bit: one aligned step differs, none does not."""
    plain = dataclasses.replace(aligned(config), alignment=AlignmentConfig())
    train_loop(plain, digits, tmp_path / "plain")
    never = dataclasses.replace(aligned(config), alignment=AlignmentConfig(strategy="reverse", weight=0.0))
    train_loop(never, digits, tmp_path / "never")
    train_loop(aligned(config, stop_at=1), digits, tmp_path / "once", runs.RandomTargets())
    assert runs.losses(tmp_path / "never") == runs.losses(tmp_path / "plain")
    assert runs.losses(tmp_path / "once") != runs.losses(tmp_path / "plain")


def test_the_gradients_disagreement_stops_it_for_good(config, digits, tmp_path):
    """A cosine is never above 1, so the first look, at step 2, stops; a resumed run remembers."""
    stopping = aligned(config, stop_below=1.0)
    targets = Counted()
    train_loop(stopping, digits, tmp_path / "whole", targets)
    assert targets.calls == 2 + 1
    assert [row["alignment_weight"] for row in rows(tmp_path / "whole")] == [0.1] + [0.0] * 5
    with pytest.raises(KeyboardInterrupt):
        train_loop(stopping, digits, tmp_path / "killed", Counted(), [Evaluator(8, runs.interrupt)])
    train_loop(stopping, digits, tmp_path / "killed", Counted())
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_stop_as_one(config, digits, tmp_path):
    """The projector gets no gradient any more, and nobody waits for one."""
    stopping = aligned(config, stop_at=6)
    train_loop(stopping, digits, tmp_path / "one", runs.RandomTargets())
    job = functools.partial(runs.training, targets=runs.RandomTargets())
    assert runs.run(job, stopping, tmp_path / "two", log=tmp_path / "log", processes=2) == [0, 0]
    runs.assert_near(tmp_path / "one", tmp_path / "two")
