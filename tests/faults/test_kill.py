"""kill -9, wherever it hits, costs nothing but the time since the last checkpoint."""

import dataclasses

import numpy as np
import pytest
import torch

import runs
from flowback import Flow, StudentConfig
from flowback.sampling.block_plan import weights_hash

pytestmark = pytest.mark.faults


def test_killed_at_ten_moments_equals_the_run_that_was_not(replaced, tmp_path):
    """A moment is any call or return of a function. Five of the ten are drawn from those inside of a save."""
    config, log = replaced(steps=80), tmp_path / "log"  # 20 saves
    assert runs.run(runs.counting, config, tmp_path / "whole", log=log) == [0]
    moments, saving = map(int, runs.printed(log).splitlines()[-1].split())
    random = np.random.default_rng(0)
    # Even the latest moments leave steps to go: 5/16 of the run, and 5 · 2 saves.
    kills = [(int(random.integers(moments // 16)), False) for _ in range(5)]
    kills += [(int(random.integers(saving // 10)), True) for _ in range(5)]
    for moment, inside in random.permutation(kills).tolist():
        assert runs.run(runs.killed, config, tmp_path / "run", moment, bool(inside), log=log) == [-9]
    assert runs.run(runs.training, config, tmp_path / "run", log=log) == [0], runs.printed(log)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "whole")


def test_a_student_killed_inside_a_save_equals_the_one_that_was_not(replaced, tmp_path):
    """Of method inverse with guidance, whose every draw comes from the batch; its teacher stays as it is."""
    torch.manual_seed(0)
    config, log = replaced(steps=8), tmp_path / "log"  # 2 saves
    teacher = Flow(config.model)
    teacher.save_pretrained(tmp_path / "teacher")
    student = StudentConfig(
        "inverse", str(tmp_path / "teacher"), weights_hash(teacher), guidance=1.0, rms=(1.0, 1.0, 1.0)
    )
    config = dataclasses.replace(config, student=student)
    assert runs.run(runs.counting, config, tmp_path / "whole", log=log) == [0]
    _, saving = map(int, runs.printed(log).splitlines()[-1].split())
    killed = runs.run(
        runs.killed, config, tmp_path / "run", 3 * saving // 4, True, log=log
    )  # the second save
    assert killed == [-9]
    assert runs.run(runs.training, config, tmp_path / "run", log=log) == [0], runs.printed(log)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "whole")
    assert weights_hash(Flow.from_pretrained(tmp_path / "teacher")) == weights_hash(teacher)
