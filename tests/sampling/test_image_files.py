"""Files of samples."""

import numpy as np
import pytest
import torch

from flowback.data.pixels import to_bytes
from flowback.sampling.image_files import grid, read_png, save_grid, save_npz, save_png, save_trajectory


def test_bytes_are_rounded_not_truncated():
    """x·127.5 + 127.5 to the nearest integer; out of range is clamped, and what is no number is black."""
    values = torch.tensor([-1.0, -0.999, 0.0, 0.5, 1.0, 7.0, float("nan"), float("inf")]).view(1, 1, 2, 4)
    assert to_bytes(values).flatten().tolist() == [0, 0, 128, 191, 255, 255, 0, 255]
    levels = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(levels / 127.5 - 1), levels.byte())


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    save_png(image, tmp_path / "a.png", {"seed": 3})
    found, notes = read_png(tmp_path / "a.png")
    assert torch.equal(found, image)
    assert notes["seed"] == "3"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_npz_is_what_adm_reads(tmp_path):
    images = torch.randint(0, 256, (4, 1, 6, 6), dtype=torch.uint8)
    save_npz(images, tmp_path / "s.npz", [3, 1, 2, 0])
    found = np.load(tmp_path / "s.npz")
    assert found["arr_0"].shape == (4, 6, 6, 3)
    assert found["arr_0"].dtype == np.uint8
    assert (found["arr_0"][2, :, :, 1] == images[2, 0].numpy()).all()
    assert found["arr_1"].tolist() == [3, 1, 2, 0]


def test_grid_places_images_row_after_row(tmp_path):
    images = torch.full((3, 1, 64, 64), -1.0)
    images[1] = 0.0
    save_grid(images, tmp_path / "g.png", columns=2)
    sheet = read_png(tmp_path / "g.png")[0][0].numpy()
    assert sheet.shape == (2 + 2 * 66, 2 + 2 * 66)
    assert (sheet[2:66, 2:66] == 0).all()
    assert (sheet[2:66, 68:132] == 128).all()
    assert (sheet[68:132, 68:132] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_a_grid_have_names(channels):
    """To the left of the images, each beside its row; a name that is too long is cut."""
    images = torch.full((3, channels, 64, 64), -1.0)
    plain, named = grid(images, 1), grid(images, 1, names=["", "a name", "x" * 500])
    width = named.shape[2] - plain.shape[2]
    assert torch.equal(named[:, :, width:], plain)
    rows = [(named[:, 2 + 66 * row : 68 + 66 * row, :width] < 128).any() for row in range(3)]
    assert rows == [False, True, True]
    assert 100 < width < 300
    assert (named[:, :, width - 3 : width] == 255).all()  # nothing is cut off


def test_many_rows_have_names(monkeypatch):
    """They are drawn in several pictures, since matplotlib's have less than 2^16 pixels along a side."""
    images, names = torch.ones(5, 1, 64, 64), [f"row {row}" for row in range(5)]
    whole = grid(images, 1, names=names)
    monkeypatch.setattr("flowback.sampling.image_files._ROWS", 2)
    assert torch.equal(grid(images, 1, names=names), whole)


def test_trajectory_shows_each_image_in_a_row(tmp_path):
    states = [3 * torch.randn(2, 3, 64, 64) for _ in range(4)]
    save_trajectory(states, tmp_path / "t.png")
    assert read_png(tmp_path / "t.png")[0].shape == (3, 2 + 2 * 66, 2 + 4 * 66)
