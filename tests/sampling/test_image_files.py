"""Files of samples."""

import numpy as np
import pytest
import torch

from flowback.data.pixels import to_bytes
from flowback.sampling.image_files import read_png, save_grid, save_npz, save_png, save_trajectory


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


def test_trajectory_shows_each_image_in_a_row(tmp_path):
    states = [3 * torch.randn(2, 3, 64, 64) for _ in range(4)]
    save_trajectory(states, tmp_path / "t.png")
    assert read_png(tmp_path / "t.png")[0].shape == (3, 2 + 2 * 66, 2 + 4 * 66)
