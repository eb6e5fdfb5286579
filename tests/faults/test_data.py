"""Images that break, and processes that die, in the middle of an epoch."""

import dataclasses
import multiprocessing
import re

import pytest
import torch
from PIL import Image

import runs
from flowback import InputError
from flowback.config import DataConfig
from flowback.data import image_folder as folders
from flowback.data.load import load_images
from flowback.training import Evaluator, train_loop
from flowback.training.batches import global_indices

pytestmark = pytest.mark.faults


@pytest.fixture
def pictures(digits, tmp_path):
    """A folder of 60 small pictures in two classes."""
    for index, pixels in enumerate(digits.read(torch.arange(60))):
        file = tmp_path / "pictures" / "ab"[index % 2] / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(file)
    return tmp_path / "pictures"


def on_read(config, pictures, monkeypatch, **data):
    """The run on that folder, and its images as those of a set too large for memory."""
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 0)
    data = DataConfig(name="folder", path=pictures, holdout=0.0, **data)
    model = dataclasses.replace(config.model, num_classes=2)
    return dataclasses.replace(config, data=data, model=model), load_images(data, 8, 1, "train")


def breaker(file, at):
    """Damages a file after a step."""

    def call(step, flow):
        if step == at:
            file.write_bytes(file.read_bytes()[:40])
        return {}

    return Evaluator(1, call)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_breaks(config, pictures, tmp_path, monkeypatch, workers):
    """Named in one sentence; repaired, the run equals one that had no trouble."""
    config, images = on_read(config, pictures, monkeypatch, workers=workers)
    train_loop(config, images, tmp_path / "whole")
    due = global_indices(0, len(images), 11 * 16, 16)[3]  # in the last step: no worker has read it by the 5th
    file = images.folder / images.files[due]
    content = file.read_bytes()
    with pytest.raises(InputError) as caught:
        train_loop(config, images, tmp_path / "run", evaluators=[breaker(file, at=5)])
    assert "\n" not in str(caught.value)
    assert images.files[due] in str(caught.value)
    assert "--data.bad-images skip" in str(caught.value)
    file.write_bytes(content)
    train_loop(config, images, tmp_path / "run")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_broken_image_is_skipped_by_name(config, pictures, tmp_path, monkeypatch, caplog):
    config, images = on_read(config, pictures, monkeypatch, bad_images="skip")
    due = global_indices(0, len(images), 11 * 16, 16)[3]
    file = images.folder / images.files[due]
    row = train_loop(config, images, tmp_path / "run", evaluators=[breaker(file, at=5)])
    assert row["step"] == 12
    assert f"Skipped {file}" in caplog.text


def test_a_worker_dies(config, pictures, tmp_path, monkeypatch):
    config, images = on_read(config, pictures, monkeypatch, workers=2)
    train_loop(config, images, tmp_path / "whole")

    others = multiprocessing.active_children()

    def call(step, flow):
        if step == 5:  # four more are read at most: the last steps need a worker
            for worker in set(multiprocessing.active_children()) - set(others):
                worker.kill()
        return {}

    with pytest.raises(InputError) as caught:
        train_loop(config, images, tmp_path / "run", evaluators=[Evaluator(1, call)])
    assert re.match(
        r"A process that decodes images died \(DataLoader worker .*\); .* --data\.workers", str(caught.value)
    )
    assert "\n" not in str(caught.value)
    train_loop(config, images, tmp_path / "run")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")
