"""Folders of samples: interrupted, shared, and with bad draws."""

import errno

import pytest
import torch

from flowback import InputError
from flowback.sampling import image_files as folders
from flowback.sampling.image_files import SampleFolder, read_png

SETTINGS = {"checkpoint": "a", "guidance": 1.0, "labels": (0, 1)}


def draw(numbers, redraw):
    """Images that depend on the batch they are drawn in, as rounding makes them do."""
    return torch.tensor(numbers).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 50 - 1 + 0.01 * numbers[0] + redraw


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.png"))}


def fill(path, count=10, world=1, draw=draw, redraws=3):
    """What each of ``world`` processes reports; all look for missing images before any draws."""
    folder = SampleFolder(path, SETTINGS, count, 4)
    folder.begin()
    missing = folder.missing()
    runs = [folder.fill(draw, lambda n: {"seed": n}, missing, rank, world, redraws) for rank in range(world)]
    return [list(run) for run in runs]


def test_interrupted_and_finished_is_the_same_to_the_byte(tmp_path):
    """Also when another number of processes goes on, and after a kill in the middle of a batch."""
    fill(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len(expected) == 10
    fill(tmp_path / "cut", world=3)
    assert contents(tmp_path / "cut") == expected
    for name in ("000001.png", "000006.png", "000009.png"):
        (tmp_path / "cut" / name).unlink()
    (tmp_path / "cut" / ".000001.png.x7k").write_bytes(b"half")
    done = fill(tmp_path / "cut", world=2)
    assert contents(tmp_path / "cut") == expected
    assert sum(drawn.images for part in done for drawn in part) == 3
    assert not list((tmp_path / "cut").glob(".*"))
    assert fill(tmp_path / "cut") == [[]]


def test_processes_share_the_batches(tmp_path):
    done = fill(tmp_path, world=2)
    assert [[drawn.images for drawn in part] for part in done] == [[4, 2], [4]]


def test_non_finite_images_are_drawn_again(tmp_path):
    def sometimes(numbers, redraw):
        images = draw(numbers, redraw).clone()
        for row, number in enumerate(numbers):
            if number == 5 and redraw < 2:
                images[row, 0, 1, 1] = float("nan")
            if number == 6:
                images[row] = float("inf")
        return images

    ((first, second),) = fill(tmp_path, 8, draw=sometimes, redraws=3)
    assert (first.redrawn, first.failed) == (0, ())
    assert (second.images, second.redrawn, second.failed) == (3, 2, (6,))
    assert read_png(tmp_path / "000005.png")[1] == {"seed": "5", "redraw": "2"}
    assert not (tmp_path / "000006.png").exists()


def test_other_images_are_left_alone(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="other images"):
        SampleFolder(tmp_path, SETTINGS, 4, 4)


def test_other_settings_are_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(InputError, match=r"guidance = 1\.0, not 2\.0"):
        SampleFolder(tmp_path, {**SETTINGS, "guidance": 2.0}, 10, 4)
    with pytest.raises(InputError, match="batch_size = 4, not 5"):
        SampleFolder(tmp_path, SETTINGS, 10, 5)
    assert SampleFolder(tmp_path, SETTINGS, 12, 4).missing() == [10, 11]  # more of the same


def test_a_full_disk_leaves_whole_files_only(tmp_path, monkeypatch):
    written, save = [], folders.save_png

    def fails(pixels, path, text):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(pixels, path, text)
        written.append(path.name)

    monkeypatch.setattr(folders, "save_png", fails)
    with pytest.raises(OSError, match="No space"):
        fill(tmp_path)
    assert sorted(contents(tmp_path)) == sorted(written)
    monkeypatch.undo()
    fill(tmp_path)
    assert len(contents(tmp_path)) == 10
