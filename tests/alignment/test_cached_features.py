"""The table of features: same values as the encoder's, made once, never mistaken for another."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flowback import InputError
from flowback.alignment import targets as module
from flowback.alignment.encoders import Encoder, Recipe
from flowback.alignment.targets import _content, cached_features
from flowback.data.image_set import MemoryImages
from flowback.data.pixels import to_unit_range


class Counting(nn.Module):
    """A strided convolution with timm's interface, which counts the images that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.conv = nn.Conv2d(3, 5, 4, 4)

    def forward_intermediates(self, x, **options):
        self.seen += len(x)
        return [self.conv(x)]


def make_encoder():
    torch.manual_seed(3)
    return Encoder("timm:counting?norm=off", Counting(), Recipe(5, 4, (0.5,) * 3, (0.5,) * 3))


@pytest.fixture
def encoder():
    return make_encoder()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8, generator=generator)  # two batches
    return MemoryImages("noise-train", (), None, pixels)


def test_rows_are_the_encoders_features(encoder, images, tmp_path):
    table = cached_features(encoder, images, 2, True, tmp_path)
    indices, flipped = torch.tensor([69, 3, 3, 0]), torch.tensor([True, False, True, False])
    clean = to_unit_range(images.read(indices))
    clean[flipped] = clean[flipped].flip(-1)
    rows = table.rows(indices, flipped)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, encoder(clean, 2))  # fp32, other batch sizes
    rows.zero_()  # the caller's own
    torch.testing.assert_close(table.rows(indices, flipped), encoder(clean, 2))


def test_computed_once(encoder, images, tmp_path):
    first = cached_features(encoder, images, 2, True, tmp_path)
    assert encoder.model.seen == 140
    again = make_encoder()
    table = cached_features(again, images, 2, True, tmp_path)
    assert again.model.seen == 0
    assert table.path == first.path
    assert torch.equal(table.values, first.values)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    assert json.loads(table.path.with_suffix(".json").read_text())["encoder"] == encoder.name


@pytest.mark.parametrize("change", ["weights", "recipe", "images", "order", "grid", "flip"])
def test_anything_else_is_another_table(encoder, images, tmp_path, change):
    before = cached_features(encoder, images, 2, False, tmp_path)
    other, grid, flip, recipe = make_encoder(), 2, False, encoder.recipe
    if change == "weights":
        with torch.no_grad():
            other.model.conv.bias[0] += 1e-3
    elif change == "recipe":
        recipe = dataclasses.replace(recipe, mean=(0.4, 0.5, 0.5))
    elif change == "images":
        images.pixels[5, 0, 0, 0] += 1
    elif change == "order":
        images = dataclasses.replace(images, pixels=images.pixels.flip(0))
    elif change == "grid":
        grid = 1
    else:
        flip = True
    images = dataclasses.replace(images)  # a set that has not hashed its pixels yet
    other = Encoder(other.name, other.model, recipe)
    table = cached_features(other, images, grid, flip, tmp_path)
    assert other.model.seen >= 70
    assert table.path != before.path
    assert before.path.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "dtype"])
def test_damaged_tables_are_made_anew(encoder, images, tmp_path, damage):
    table = cached_features(encoder, images, 2, False, tmp_path)
    path, expected = table.path, table.values.numpy().copy()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.save(path, expected[:5] if damage == "shape" else expected.astype(np.float64))
    again = cached_features(encoder, images, 2, False, tmp_path).values
    assert again.dtype == torch.float32
    np.testing.assert_array_equal(again, expected)


def test_nothing_is_left_of_a_failure(encoder, images, tmp_path):
    with torch.no_grad():
        encoder.model.conv.bias[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        cached_features(encoder, images, 2, False, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_mirror_images(encoder, images, tmp_path):
    table = cached_features(encoder, images, 2, False, tmp_path)
    with pytest.raises(ValueError, match="no features of mirror images"):
        table.rows(torch.tensor([0, 1]), torch.tensor([False, True]))


def test_no_room(encoder, images, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"noise-train need 0.0 GB, .* make room, or choose a smaller"):
        cached_features(encoder, images, 2, False, tmp_path)


def test_it_is_said_what_is_encoded(encoder, images, tmp_path, caplog):
    for _ in range(2):
        with caplog.at_level("INFO", "flowback"):
            table = cached_features(encoder, images, 2, True, tmp_path)
    assert caplog.messages == [
        "Encoding 70 images and their mirror images of noise-train with timm:counting?norm=off on cpu, once: "
        f"1.12e-05 GB in {table.path}."
    ]


def test_what_a_killed_process_left_is_removed(encoder, images, tmp_path, monkeypatch):
    """But not what a process that lives is writing."""
    during, forward = set(), encoder.model.forward_intermediates
    monkeypatch.setattr(
        encoder.model,
        "forward_intermediates",
        lambda x, **options: during.update(tmp_path.iterdir()) or forward(x, **options),
    )
    table = cached_features(encoder, images, 2, True, tmp_path)
    (temporary,) = during
    table.path.unlink()

    def left_by(process):
        file = temporary.with_name(temporary.name.replace(str(os.getpid()), str(process)))
        file.write_bytes(b"half")
        return file

    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True, text=True
    )
    killed, alive, other = left_by(int(ended.stdout)), left_by(os.getppid()), tmp_path / ".other.1.npy"
    other.write_bytes(b"of another machine")
    old = tmp_path / ".other.2.npy"
    old.write_bytes(b"of a machine that is no more")
    os.utime(old, (0, 0))
    cached_features(encoder, images, 2, True, tmp_path)
    assert set(tmp_path.iterdir()) == {alive, other, table.path, table.path.with_suffix(".json")}
    assert not killed.exists()


def test_tables_of_rounded_convolutions_are_tables_of_their_own(encoder, images, monkeypatch):
    """PyTorch rounds the factors of convolutions to TF32 on CUDA, unless it is told not to."""
    here = _content(encoder, images, [5, 1, 4, 3])
    with FakeTensorMode():
        encoder.mean = torch.zeros(3, device="cuda")
    assert _content(encoder, images, [5, 1, 4, 3]) == {**here, "convolutions": "tf32"}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert _content(encoder, images, [5, 1, 4, 3]) == here


class StoppedError(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("damage", [None, "note", "rows"])
def test_a_stopped_computation_goes_on(encoder, images, tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setattr(module, "_FLUSHED", 16)
    monkeypatch.setattr(module, "_BATCH", 16)
    expected = cached_features(encoder, images, 2, True, tmp_path / "whole").values
    stopped, forward = make_encoder(), encoder.model.forward_intermediates

    def until_the_third(x, **options):
        stopped.model.seen += len(x)
        if stopped.model.seen > 80:
            raise StoppedError
        return forward(x, **options)

    monkeypatch.setattr(stopped.model, "forward_intermediates", until_the_third)
    with pytest.raises(StoppedError):
        cached_features(stopped, images, 2, True, tmp_path)
    left = sorted(file for file in tmp_path.iterdir() if file.is_file())
    assert [file.suffix for file in left] == [".json", ".npy"]
    if damage:
        file = left[0] if damage == "note" else left[1]
        file.write_bytes(file.read_bytes()[:-7])
    again = make_encoder()
    with caplog.at_level("INFO", "flowback"):
        table = cached_features(again, images, 2, True, tmp_path)
    assert again.model.seen == (140 if damage else 140 - 64)
    assert ("; 32 are there already." in caplog.text) == (damage is None)
    assert torch.equal(table.values, expected)
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.is_file()) == [".json", ".npy"]
