"""Whatever happens to the files of the newest checkpoint, it is named and the one before it is used."""

import dataclasses
import json
import os
import shutil
import time

import pytest

import runs
from flowback import InputError, checkpoint
from flowback.training import Evaluator, train_loop

pytestmark = pytest.mark.faults


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A finished run with two averages and two checkpoints, and its settings."""
    config = runs.tiny_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ema_more=(0.5,)))
    out = tmp_path_factory.mktemp("damage") / "whole"
    train_loop(config, digits, out)
    return out, config


FILES = ("config.json", "model.safetensors", "ema-0.5.safetensors", "training.pt")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint(whole, digits, tmp_path, caplog, name, damage):
    out, config = whole
    shutil.copytree(out, tmp_path / "run")
    file = checkpoint.resolve(tmp_path / "run") / name
    damage(file)
    train_loop(config, digits, tmp_path / "run")
    assert str(file) in caplog.text
    assert "Using the checkpoint before it." in caplog.text
    runs.assert_same_run(out, tmp_path / "run")


def test_no_checkpoint_is_usable(whole, digits, tmp_path):
    out, config = whole
    shutil.copytree(out, tmp_path / "run")
    for folder in checkpoint.step_folders(tmp_path / "run"):
        truncate(folder / "training.pt")
    with pytest.raises(InputError, match=r"No checkpoint in .* is usable; remove .* to start again"):
        train_loop(config, digits, tmp_path / "run")


def test_a_lost_environment_is_written_again(whole, digits, tmp_path):
    out, config = whole
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / "environment.json").write_text("{")
    train_loop(config, digits, tmp_path / "run")
    assert '"resumed"' in (tmp_path / "run" / "environment.json").read_text()


def test_the_clock_jumps_back(config, digits, tmp_path, monkeypatch):
    """Order comes from steps, durations from a clock that cannot jump; dates are only written down."""
    train_loop(config, digits, tmp_path / "whole")

    late = time.time()

    def jump_and_interrupt(step, flow):
        if step == 6:
            monkeypatch.setattr(time, "time", lambda: late - 86400)
            monkeypatch.setattr(time, "time_ns", lambda: int((late - 86400) * 1e9))
        if step == 10:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train_loop(config, digits, tmp_path / "run", evaluators=[Evaluator(1, jump_and_interrupt)])
    old, new = checkpoint.step_folders(tmp_path / "run")
    os.utime(new, (late - 86400, late - 86400))
    os.utime(old, (late, late))
    row = train_loop(config, digits, tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["resumed"][0]["step"] == 8
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert row["images_per_second"] > 0
    assert row["seconds"] > 0
