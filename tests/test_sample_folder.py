"""Folders of samples: interrupted, shared, and with bad draws."""

import errno

import pytest
import torch

from flowback import Flow, InputError, ModelConfig, draw_folder, sample
from flowback import sample_folder as folders
from flowback.data.pixels import to_bytes
from flowback.folder_lock import folder_lock
from flowback.sample_folder import Failed, SampleFolder, class_ids
from flowback.sampling.image_files import read_png
from flowback.sampling.sampler import Overflow
from flowback.task_config import FolderConfig
from sampling.flows import tame_flow
from sampling.test_sampler import breaking

SETTINGS = {"checkpoint": "a", "guidance": 1.0, "labels": (0, 1)}


class Draw:
    """Images that depend on the batch they are drawn in, as rounding makes them do."""

    def __call__(self, numbers, redraw):
        return (
            torch.tensor(numbers).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 50 - 1 + 0.01 * numbers[0] + redraw
        )

    def notes(self, number):
        return {"seed": number}

    def overflows(self, numbers, redraw):
        return [Overflow(1, number) for number in numbers]


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.png"))}


def fill(path, count=10, world=1, draw=None, redraws=3):
    """What each of ``world`` processes reports; all look for missing images before any draws."""
    folder = SampleFolder(path, SETTINGS, count, 4)
    folder.begin()
    missing = folder.missing()
    runs = [folder.fill(draw or Draw(), missing, rank, world, redraws) for rank in range(world)]
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
    class Sometimes(Draw):
        def __call__(self, numbers, redraw):
            images = super().__call__(numbers, redraw).clone()
            for row, number in enumerate(numbers):
                if number == 5 and redraw < 2:
                    images[row, 0, 1, 1] = float("nan")
                if number == 6:
                    images[row] = float("inf")
            return images

    ((first, second),) = fill(tmp_path, 8, draw=Sometimes(), redraws=3)
    assert (first.redrawn, first.failed) == (0, ())
    assert (second.images, second.redrawn) == (3, 1)  # what failed does not count as redrawn
    assert second.failed == (Failed(6, Overflow(1, 6)),)
    assert read_png(tmp_path / "000005.png")[1] == {"seed": "5", "redraw": "2"}
    assert not (tmp_path / "000006.png").exists()


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("name", ["holiday.png", "cat/000000.png", "cat/deep/mine.txt", "grid.png"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, name, begun):
    """At any depth: samples written into a folder of images for training would become a part of it."""
    if begun:
        fill(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=f"holds something else .*{name}"):
        SampleFolder(tmp_path, SETTINGS, 10, 4)


def test_records_and_hidden_files_may_lie_beside_samples(tmp_path):
    (tmp_path / ".DS_Store").touch()
    fill(tmp_path)
    for name in ("report.json", "all.npz"):
        (tmp_path / name).touch()
    assert fill(tmp_path) == [[]]


def test_only_one_process_draws_into_a_folder(flow, tmp_path):
    with folder_lock(tmp_path), pytest.raises(InputError, match="is in use by process"):
        draw_folder(flow, tmp_path, count=1)
    assert list(tmp_path.iterdir()) == []


def test_what_came_in_between_is_seen_under_the_lock(tmp_path):
    folder = SampleFolder(tmp_path, SETTINGS, 4, 4)
    (tmp_path / "mine.png").touch()
    with pytest.raises(InputError, match="holds something else"):
        folder.begin()


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


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        SampleFolder(tmp_path / "out", SETTINGS, 4, 4)


@pytest.fixture(scope="module")
def flow():
    return tame_flow(torch.float32)


def test_draws_what_sample_draws(flow, tmp_path):
    report = draw_folder(flow, tmp_path, count=5, labels=[1, 3], seed=7, guidance=1.5, batch_size=2)
    assert (report.drawn, report.present, report.redrawn, report.failed) == (5, 0, 0, ())
    assert report.problem is None
    expected = to_bytes(sample(flow, [1, 3, 1, 3, 1], range(7, 12), 1.5))
    for number in range(5):
        pixels, _ = read_png(tmp_path / f"{number:06d}.png")
        assert (pixels.int() - expected[number].int()).abs().max() <= 1
    again = draw_folder(flow, tmp_path, FolderConfig(5, (1, 3), seed=7), guidance=1.5, batch_size=2)
    assert (again.drawn, again.present) == (0, 5)
    assert again.to_dict()["result"]["images_per_second"] == 0


def test_images_of_other_weights_do_not_mix(flow, tmp_path):
    """Whatever the path of their checkpoint: a run's newest one, say, changes while it trains."""
    draw_folder(flow, tmp_path, count=1)
    with pytest.raises(InputError, match="holds images drawn with weights ="):
        draw_folder(tame_flow(torch.float32, seed=1), tmp_path, count=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [5]}, "out of range"),
        ({"labels": ["cat"]}, "does not know the names"),
        ({"seed": 2**32 - 3}, "--seed"),
        ({"seed": -1}, "--seed"),
        ({"unconditional": True, "guidance": 1.0}, "give labels"),
        ({"guided_blocks": 3}, "guided blocks"),
        ({"grid": "."}, "is a folder"),
        ({"grid": "OUT/grid.png"}, "lies in .*among the images"),
        ({"trajectory": "OUT/deep/t.png"}, "lies in .*among the images"),
        ({"npz": f"{__file__}/s.npz"}, "is not a folder"),
    ],
)
def test_nothing_is_written_before_everything_is_checked(flow, tmp_path, options, message):
    place = str(tmp_path / "out")
    options = {k: v.replace("OUT", place) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(InputError, match=message):
        draw_folder(flow, tmp_path / "out", count=4, **options)
    assert not (tmp_path / "out").exists()


def test_labels_by_name_or_id():
    """A number is an id, unless a class has it for a name; folders sort as 1, 10, 2."""
    config = ModelConfig(
        image_size=4, channels=1, patch_size=2, width=16, blocks=1, layers=1, head_dim=16, num_classes=3
    )
    for classes, labels, expected in (
        ((), ["2", "0", 1], [2, 0, 1]),
        (("ant", "bee", "cow"), ["cow", "0", 1], [2, 0, 1]),
        (("1", "10", "2"), ["2", "10", "1"], [2, 1, 0]),
        (("1", "10", "2"), [2, 0, "0"], [2, 0, 0]),
    ):
        assert class_ids(Flow(config, classes), labels) == expected
    for labels, message in ((["bat"], "did you mean"), (["7"], "out of range"), (["-1"], "no class")):
        with pytest.raises(InputError, match=message):
            class_ids(Flow(config, ("ant", "bat_", "cow")), labels)


def test_the_report_names_block_and_token(tmp_path):
    """Block 2 reads backwards: place 5 of its order is token 10 of 16."""
    report = draw_folder(breaking(2, 5), tmp_path, count=3, redraws=1)
    assert (report.drawn, report.redrawn) == (0, 0)
    assert report.failed == tuple(Failed(number, Overflow(2, 10)) for number in range(3))
    assert report.problem.startswith(f"3 of 3 images are missing in {tmp_path}, since they stayed non-finite")
    assert "image 0 first broke in block 2, token 10" in report.problem
    assert report.to_dict()["result"]["failed"][1] == {"image": 1, "block": 2, "token": 10, "step": None}
    assert "non-finite in (images in brackets): block 2 (3)." in report.notices[0]
    assert not list(tmp_path.glob("*.png"))


def test_the_grid_has_rows_for_the_classes_drawn(flow, tmp_path, monkeypatch):
    """Two images of a model of five classes: two rows, not five, with their classes' names."""
    written = []
    monkeypatch.setattr(folders, "save_grid", lambda *arguments, names: written.append(names))
    draw_folder(flow, tmp_path / "s", count=2, labels=[3, 1], grid=tmp_path / "g.png")
    monkeypatch.setattr(flow, "classes", tuple("abcde"))
    draw_folder(flow, tmp_path / "s", count=2, labels=[3, 1], grid=tmp_path / "g.png")
    assert written == [["3", "1"], ["d", "b"]]
    monkeypatch.undo()
    draw_folder(flow, tmp_path / "s", count=2, labels=[3, 1], grid=tmp_path / "g.png")
    assert read_png(tmp_path / "g.png")[0].shape[1] == 2 + 2 * 66


def test_images_out_of_range_are_written_counted_and_named(flow, tmp_path, monkeypatch):
    def bright(self, labels, seeds, redraw=0):
        return torch.stack([torch.full((1, 4, 4), -1.6 if seed == 2 else 1.4) for seed in seeds])

    monkeypatch.setattr(folders.Sampler, "__call__", bright)
    report = draw_folder(flow, tmp_path, count=4, batch_size=3)
    assert (report.drawn, report.out_of_range) == (4, 1)
    assert (
        "1 of 4 images have values more than 0.5 outside [-1, 1], which are clipped: image 2."
        in report.notices
    )
    assert report.to_dict()["result"]["out_of_range"] == 1
    assert read_png(tmp_path / "000002.png")[0].max() == 0
