"""Two processes on the CPU (gloo) against one, and what happens when one of them stops, dies or hangs."""

import dataclasses
import functools
import json
import signal

import pytest

import runs
from flowback import InputError, checkpoint
from flowback.config import AlignmentConfig, TrainConfig
from flowback.training import distributed, train_loop


@pytest.mark.parametrize(
    ("strategy", "micro", "noise"), [("none", 4, "gaussian"), ("reverse", None, "range")]
)
def test_two_processes_are_one_but_for_the_order_of_sums(config, digits, tmp_path, strategy, micro, noise):
    """With a range of noise levels, some of which are aligned: so are the figures by level."""
    alignment = AlignmentConfig(strategy=strategy, order="exact", locations=((1, 1), (2, 1)), hidden=8)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, noise=noise),
        alignment=dataclasses.replace(alignment, levels=(0.1, 0.3) if noise == "range" else None),
        train=dataclasses.replace(config.train, micro_batch=micro),
    )
    train_loop(config, digits, tmp_path / "one", runs.RandomTargets())
    job = functools.partial(runs.training, targets=runs.RandomTargets())
    assert runs.run(job, config, tmp_path / "two", log=tmp_path / "log", processes=2) == [0, 0]
    assert [runs.printed(tmp_path / "log", rank) for rank in (0, 1)] == ["12\n", "12\n"]
    runs.assert_near(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_at_the_same_step_and_one_goes_on(config, digits, tmp_path, rank):
    train_loop(config, digits, tmp_path / "whole")
    job = functools.partial(runs.training, targets=runs.Trouble(5, signal.SIGTERM, rank))
    assert runs.run(job, config, tmp_path / "run", log=tmp_path / "log", processes=2) == [75, 75]
    assert checkpoint.resolve(tmp_path / "run").name == "step-00000006"  # the answer comes a step later
    train_loop(config, digits, tmp_path / "run")
    runs.assert_near(tmp_path / "whole", tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_dies_the_other_ends_and_one_goes_on(config, digits, tmp_path, rank):
    """Its connection breaks at once; 30 s are the stated time, and mostly for a slow machine."""
    saved = tmp_path / "run" / "checkpoints" / "step-00000004"
    job = functools.partial(runs.training, targets=runs.Trouble(7, signal.SIGKILL, rank, after=saved))
    started = runs.start(job, config, tmp_path / "run", log=tmp_path / "log", processes=2)
    started[rank].join(60)
    started[1 - rank].join(30)
    assert [process.exitcode for process in started] == ([-9, 74] if rank == 0 else [74, -9])
    assert f"lost: Process {1 - rank} of 2 has lost another process (" in runs.printed(
        tmp_path / "log", 1 - rank
    )
    assert checkpoint.resolve(tmp_path / "run") == saved
    train_loop(config, digits, tmp_path / "run")
    train_loop(config, digits, tmp_path / "whole")
    runs.assert_near(tmp_path / "whole", tmp_path / "run")


@pytest.mark.faults
def test_a_process_that_hangs_is_given_up_after_the_stated_time(config, tmp_path):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, timeout=2.0))
    job = functools.partial(runs.training, targets=runs.Trouble(5, signal.SIGSTOP, 1))
    started = runs.start(job, config, tmp_path / "run", log=tmp_path / "log", processes=2)
    started[0].join(60)
    started[1].kill()
    started[1].join()
    assert started[0].exitcode == 74
    assert "lost: Process 0 of 2 has lost another process (" in runs.printed(tmp_path / "log")


def test_the_command_prints_once(tmp_path):
    words = (
        "--train.steps 4 --train.save-every 2 --train.eval-every 4 --train.eval-images 8 --train.log-every 2"
    )
    job, out = functools.partial(runs.command, "train", "digits-mini"), tmp_path / "run"
    codes = runs.run(job, "--out", str(out), *words.split(), log=tmp_path / "log", processes=2)
    assert codes == [0, 0], runs.printed(tmp_path / "log")
    assert f"Checkpoint: {out}" in runs.printed(tmp_path / "log")
    assert runs.printed(tmp_path / "log", 1) == ""
    environment = json.loads((out / "environment.json").read_text())
    assert environment["processes"] == 2


def test_a_batch_that_the_processes_cannot_share(config, tmp_path):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=15))
    job = functools.partial(runs.training)
    assert runs.run(job, config, tmp_path / "run", log=tmp_path / "log", processes=2) == [1, 1]
    assert "--train.batch-size 15 is not divisible by 2 processes" in runs.printed(tmp_path / "log", 1)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match=r"--train\.device vulkan is unknown; known: auto, cpu"):
        distributed.start(TrainConfig(device="vulkan"))


def test_processes_that_the_device_does_not_join(monkeypatch):
    """Each would train all of it, into one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were launched"):
        distributed.start(TrainConfig(device="cpu"))


def test_the_vote_of_one_is_its_own():
    vote = distributed.Vote(distributed.start(TrainConfig(device="cpu")), timeout=1.0)
    assert [vote(flag) for flag in (False, True)] == [False, True]
    assert not vote.close()
