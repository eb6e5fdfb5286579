"""Checkpoints are written while the training goes on, as it was when they were begun."""

import dataclasses
import threading
from concurrent.futures import wait

import pytest
import torch

import runs
from flowback import checkpoint
from flowback.errors import InputError
from flowback.training import Evaluator, train_loop
from flowback.training.distributed import gathered
from flowback.training.run_folder import Writer


def fails():
    raise InputError("no room")


def test_copies_share_nothing_and_are_the_same():
    tree = {"a": torch.arange(3.0), "b": [torch.ones(2), {"c": 5}], "d": (None, "e")}
    made = gathered(tree, device=torch.device("cpu"))
    tree["a"].zero_()
    tree["b"][0].zero_()
    assert torch.equal(made["a"], torch.arange(3.0))
    assert torch.equal(made["b"][0], torch.ones(2))
    assert (made["b"][1], made["d"]) == ({"c": 5}, (None, "e"))


def test_one_job_at_a_time_and_what_it_raises():
    writer, gate, done = Writer(), threading.Event(), []
    writer.start(lambda: done.append(gate.wait(60)))
    writer.check()  # not over: nothing to raise
    assert not done
    gate.set()
    writer.start(done.append, "second")
    assert done[0] is True
    writer.wait()
    assert done == [True, "second"]

    over = writer.start(fails)
    wait([over])
    with pytest.raises(InputError, match="no room"):
        writer.check()
    writer.wait()  # said once
    writer.close()


def test_what_nobody_waited_for_is_said_at_the_end(caplog):
    writer = Writer()
    writer.start(fails)
    writer.close()
    assert caplog.messages == ["no room"]


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(config, digits, tmp_path, monkeypatch):
    """The one of step 4 is held up until step 7 has changed all weights."""
    save, gate = checkpoint.save, threading.Event()

    def late(folder, *arguments):
        assert folder.name != "step-00000004" or gate.wait(60)
        save(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", late)
    keep = dataclasses.replace(config, train=dataclasses.replace(config.train, keep_last=9))
    opener = Evaluator(1, lambda step, flow: gate.set() or {} if step == 7 else {})
    train_loop(keep, digits, tmp_path / "late", evaluators=[opener])
    monkeypatch.undo()
    train_loop(keep, digits, tmp_path / "plain")
    for step in (4, 8, 12):
        pair = [tmp_path / name / "checkpoints" / f"step-{step:08d}" for name in ("late", "plain")]
        runs.assert_same_run(*pair)
