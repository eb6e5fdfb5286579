from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowback import Flow, InputError, ModelConfig, RunConfig, checkpoint, load
from reference import TINY, random_flow, random_images

CONFIG = RunConfig(model=ModelConfig(**TINY, num_classes=5))
TRAINING = {"step": 7, "lr": [0.1, 0.2], "moments": {"a": torch.arange(3.0)}}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return random_flow(torch.float32, seed).state_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint with its training state."""
    checkpoint.save(tmp_path / "saved", CONFIG, weights(), TRAINING)
    return tmp_path / "saved"


def sentence(call, *arguments) -> str:
    """The message of the InputError that a call raises: one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(flow: Flow, expected: dict[str, torch.Tensor]) -> bool:
    found = flow.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_a_checkpoint_gives_the_same_flow_back(folder):
    flow = load(folder)
    assert not flow.training
    assert flow.config == CONFIG.model
    assert same(flow, weights())
    assert checkpoint.load_config(folder) == CONFIG
    images = random_images(flow, 2)
    assert torch.equal(flow(images).z, random_flow(torch.float32)(images).z)
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.pt",
    ]


def test_the_training_state_comes_back_and_may_be_left_out(folder, tmp_path):
    state = checkpoint.load_training_state(folder)
    assert torch.equal(state["moments"]["a"], TRAINING["moments"]["a"])
    assert {**state, "moments": 0} == {**TRAINING, "moments": 0}
    checkpoint.save(tmp_path / "bare", CONFIG, weights())
    assert same(load(tmp_path / "bare"), weights())
    assert "this checkpoint can be used, but its training cannot continue" in sentence(
        checkpoint.load_training_state, tmp_path / "bare"
    )


def test_a_run_means_its_newest_checkpoint(tmp_path):
    for step in (2, 10, 1):
        checkpoint.save(tmp_path / "checkpoints" / f"step-{step:08d}", CONFIG, weights(step))
    assert [folder.name[-2:] for folder in checkpoint.step_folders(tmp_path)] == ["01", "02", "10"]
    assert same(load(tmp_path), weights(10))
    assert same(load(str(tmp_path / "checkpoints" / "step-00000002")), weights(2))


def test_saving_again_replaces(folder):
    checkpoint.save(folder, CONFIG, weights(1))
    assert same(load(folder), weights(1))
    assert not (folder / "training.pt").exists()
    assert [entry.name for entry in folder.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    "name", ["checkpoints/step-00000002/model.safetensors", "metrics.jsonl", ".git/config", "README.md"]
)
def test_a_folder_that_holds_more_is_not_replaced(folder, name):
    """It would be removed with all that is in it: a run's folder has a config.json, too."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    assert "holds something other than a checkpoint" in sentence(checkpoint.save, folder, CONFIG, weights(1))
    assert same(load(folder), weights(0))


def test_what_other_verbs_wrote_goes_with_the_weights(folder):
    for name in ("sampling-plan.json", "evaluation/evaluate.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    checkpoint.save(folder, CONFIG, weights(1))
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def full_disk(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["save_file", "torch.save", "write_json", "_flush"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_in_the_middle_leaves_the_old_checkpoint_or_nothing(tmp_path, monkeypatch, place, exists):
    folder = tmp_path / "saved"
    if exists:
        checkpoint.save(folder, CONFIG, weights(), TRAINING)
    monkeypatch.setattr(f"flowback.checkpoint.{place}", lambda *_, **__: full_disk())
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, CONFIG, weights(1), TRAINING)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == (["saved"] if exists else [])
    if exists:
        assert same(load(folder), weights())
        assert checkpoint.load_training_state(folder)["step"] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, replacing a folder takes two renames")
def test_a_folder_that_is_replaced_is_there_at_every_moment(folder):
    """A moment is any call or return of a function."""
    there = []
    sys.setprofile(lambda *_: there.append((folder / "config.json").is_file()))
    try:
        checkpoint.save(folder, CONFIG, weights(1))
    finally:
        sys.setprofile(None)
    assert len(there) > 100
    assert all(there)
    assert same(load(folder), weights(1))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_leaves_the_old_checkpoint(folder, monkeypatch, failing):
    calls, rename = [], Path.rename

    def fails(self: Path, target: Path) -> Path:
        calls.append(self)
        return full_disk() if len(calls) == failing else rename(self, target)

    monkeypatch.setattr(checkpoint, "_exchange", lambda *_: False)  # as on file systems that cannot
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, CONFIG, weights(1))
    monkeypatch.undo()
    assert same(load(folder), weights())
    assert [entry.name for entry in folder.parent.iterdir()] == ["saved"]


def test_a_process_killed_while_it_saves_leaves_the_one_before(tmp_path):
    step = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.save(step, CONFIG, weights())
    # exits, as kill -9 does, without a chance to tidy up, when the weights are written and config.json is not
    code = f"""
import os
from flowback import Flow, checkpoint
checkpoint.write_json = lambda *_: os._exit(9)
old, new = {str(step)!r}, {str(step.with_name("step-00000002"))!r}
checkpoint.save(new, checkpoint.load_config(old), Flow.from_pretrained(old).state_dict())
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list(step.parent.iterdir())) == 2  # the unfinished folder is there ...
    assert checkpoint.step_folders(tmp_path) == [step]  # ... and is not taken for a checkpoint
    assert same(load(tmp_path), weights())


def test_no_checkpoint_there(tmp_path):
    assert "No checkpoint at" in sentence(load, tmp_path / "nowhere")
    assert "the folder does not exist" in sentence(load, tmp_path / "nowhere")
    assert "give a folder with config.json and model.safetensors, or a run" in sentence(load, tmp_path)


def test_a_missing_file_is_named(folder):
    (folder / "config.json").unlink()
    assert sentence(load, folder).startswith(
        f"{folder / 'config.json'} is missing: the checkpoint is incomplete"
    )


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_truncated_weights_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert sentence(load, folder).startswith(f"{file} is damaged")


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_flipped_bit_is_found(folder, name, share):
    file = folder / name
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 4
    file.write_bytes(content)
    read = load if name == "model.safetensors" else checkpoint.load_training_state
    assert sentence(read, folder).startswith(f"{file} is damaged: its SHA-256 is not the one in config.json")


def change_config(folder: Path, **changes) -> None:
    """As a user would, or another program."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


def test_an_edited_config_is_used_and_the_sections_are_named(folder, caplog):
    change_config(folder, data={"name": "folder", "path": "/moved"}, classes=list("abcde"))
    flow = load(folder)
    assert flow.classes == tuple("abcde")
    assert flow.run.data.path == Path("/moved")
    said = f"{folder / 'config.json'} was edited after it was written (data, classes); it is used as it is."
    assert [record.message for record in caplog.records] == [said]  # once, though it is read several times


def test_a_config_in_another_layout_is_the_same(folder, caplog):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    assert same(load(folder), weights())
    assert not caplog.records


def test_an_edited_value_is_checked(folder):
    change_config(folder, train={"lr": "fast"})
    assert sentence(load, folder) == (
        f'{folder / "config.json"}: Option train.lr is "fast", which is not a finite number.'
    )


def test_other_folders_beside_the_steps_are_left_alone(tmp_path):
    step = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.save(step, CONFIG, weights())
    for other in ("step-00000010-best", "step-00000011.old", "step-latest"):
        checkpoint.save(step.with_name(other), CONFIG, weights(1))
    assert checkpoint.step_folders(tmp_path) == [step]
    assert same(load(tmp_path), weights())
    assert same(load(step.with_name("step-00000010-best")), weights(1))
    assert checkpoint.resolve(step.parent) == step


def test_the_runs_in_a_folder_are_named(tmp_path):
    for name in ("none", "reverse"):
        checkpoint.save(tmp_path / "demo" / name / "checkpoints" / "step-00000010", CONFIG, weights())
    checkpoint.save(tmp_path / "demo" / "kept", CONFIG, weights())
    (tmp_path / "demo" / "report.md").write_text("a report")
    folder = tmp_path / "demo"
    expected = f"give one of {folder / 'kept'}, {folder / 'none'}, {folder / 'reverse'}."
    assert sentence(load, folder) == f"No checkpoint at {folder}, but there are some inside it; {expected}"
    assert sentence(load, folder / "report.md").startswith(
        f"No checkpoint at {folder / 'report.md'}: it is a "
    )


def test_systems_without_rename_of_two_or_sync_of_folders(folder, monkeypatch):
    """As on macOS and Windows, where a folder cannot be opened and files only be flushed when writable."""
    synced = os.fsync

    def windows_fsync(handle):
        assert not stat.S_ISDIR(os.fstat(handle).st_mode)
        assert fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR
        synced(handle)

    monkeypatch.setattr(checkpoint.sys, "platform", "win32")
    monkeypatch.setattr(checkpoint.os, "fsync", windows_fsync)
    monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda _: pytest.fail("no C library by that name"))
    checkpoint.save(folder, CONFIG, weights(1))
    assert same(load(folder), weights(1))


def test_a_newer_format_is_refused(folder):
    change_config(folder, format=checkpoint.FORMAT + 1)
    assert sentence(load, folder).endswith("has format 2, but this flowback reads up to 1; update it.")


def test_another_programs_config_is_refused(folder):
    change_config(folder, format=None)
    assert sentence(load, folder).endswith("has no format number: this is not a flowback checkpoint.")
    (folder / "config.json").write_text("[1, 2]")
    assert "is damaged: it holds no JSON object" in sentence(load, folder)


def test_a_truncated_config_is_named(folder):
    file = folder / "config.json"
    file.write_text(file.read_text()[:-20])
    assert sentence(load, folder).startswith(f"{file} is damaged: it is not JSON")


def test_an_unknown_setting_is_named_with_the_file(folder):
    change_config(folder, sampler={})
    assert sentence(load, folder).startswith(f"{folder / 'config.json'}: Unknown option sampler; ")


def test_weights_of_another_model_are_refused(folder):
    change_config(folder, model={**TINY, "width": 64, "num_classes": 5})
    assert sentence(load, folder).startswith(f"The weights in {folder} do not fit its config.json: ")


def test_the_training_state_is_never_unpickled_as_code(folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    (folder / "training.pt").write_bytes(pickle.dumps(Payload()))
    change_config(folder, sha256={})
    assert "training.pt is damaged" in sentence(checkpoint.load_training_state, folder)
    torch.save({"step": Payload()}, folder / "training.pt")
    assert "training.pt is damaged" in sentence(checkpoint.load_training_state, folder)
    assert not (folder / "owned").exists()


def test_the_runs_near_a_folder_that_is_not_there_are_named(tmp_path):
    for name in ("none", "reverse"):
        checkpoint.save(
            tmp_path / "runs" / "demo" / name / "checkpoints" / "step-00000010", CONFIG, weights()
        )
    runs = tmp_path / "runs"
    names = f"{runs / 'demo' / 'none'}, {runs / 'demo' / 'reverse'}"
    assert (
        sentence(load, runs) == f"No checkpoint at {runs}, but there are some inside it; give one of {names}."
    )
    assert sentence(load, runs / "dmo") == (
        f"No checkpoint at {runs / 'dmo'}: the folder does not exist; in {runs} there are {names}."
    )
    assert same(load(runs / "demo" / "none" / "checkpoints"), weights())
