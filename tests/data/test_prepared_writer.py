"""`flowback prepare`: the bytes, resuming after a kill, and what is refused."""

import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.nn import functional

from data.test_sources import write_shard
from flowback import DataConfig, InputError
from flowback.data import decode_pool
from flowback.data import prepared_writer as module
from flowback.data.decode_pool import Settings
from flowback.data.image_set import FeatureSettings
from flowback.data.load import load_images
from flowback.data.pixels import decode, fit, read_image
from flowback.data.prepared import load_prepared
from flowback.data.prepared_writer import prepare
from flowback.data.sources import open_source
from flowback.folder_lock import folder_lock

BICUBIC = Settings(image_size=16, channels=3, crop="bicubic", holdout=0.25)


def write_images(folder, classes=("ant", "bee"), count=20, ending="png"):
    """Crops of a photograph; every image differs."""
    picture = load_sample_image("china.jpg")
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            top, left = 9 * index, 200 * number + 3 * index
            Image.fromarray(picture[top : top + 48, left : left + 60]).save(
                folder / name / f"{index:03d}.{ending}"
            )
    return folder


def make(data, out, settings=BICUBIC, labels=None, **options):
    sources = open_source(str(data), settings.image_size, settings.channels, settings.holdout, labels)
    return prepare(sources, out, str(data), settings, **options)


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def small_commits(monkeypatch):
    monkeypatch.setattr(module, "TASK", 4)
    monkeypatch.setattr(decode_pool, "TASK", 4)
    monkeypatch.setattr(module, "COMMIT", 2)


# --- crops ---


@pytest.mark.parametrize("size", [64, 100, 213])
def test_adm_crop_is_resize_then_cut(size):
    """Against the plain form: halve, resize the whole image, cut the centre out."""
    image = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
    small = image
    while min(small.size) >= 2 * size:
        small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
    scale = size / min(small.size)
    whole = np.asarray(
        small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.BICUBIC)
    )
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    expected = whole[top : top + size, left : left + size].transpose(2, 0, 1)
    # The filter's weights come from the box in floats: a value may round the other way.
    difference = np.abs(fit(image, size, 3, "adm").astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("size", [64, 213])
def test_tarflow_crop_is_torchvisions(size):
    from torchvision import transforms

    image = Image.fromarray(load_sample_image("china.jpg"))
    expected = np.asarray(transforms.CenterCrop(size)(transforms.Resize(size)(image))).transpose(2, 0, 1)
    difference = np.abs(fit(image, size, 3, "tarflow").astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


# --- the bytes ---


def test_prepared_images_are_those_of_the_folder(tmp_path):
    """With the folder's crop: the same pixels, labels, names and split as training from the folder."""
    data = write_images(tmp_path / "data")
    make(data, tmp_path / "out")
    for split in ("train", "test"):
        config = DataConfig("folder", data, holdout=0.25)
        expected = load_images(config, 16, 3, split)
        found = load_images(DataConfig(path=tmp_path / "out"), 16, 3, split)
        everything = torch.arange(len(expected))
        assert len(found) == len(expected) > 0
        assert torch.equal(found.read(everything), expected.read(everything))
        assert torch.equal(found.labels, expected.labels)
        assert found.classes == expected.classes == ("ant", "bee")
        assert [found.file_name(i) for i in range(len(found))] == list(expected.files)
        shuffled = everything.flip(0)
        assert torch.equal(found.read(shuffled), expected.read(shuffled))
    again = pickle.loads(pickle.dumps(found))  # what a loading process gets
    assert len(pickle.dumps(found)) < 1000
    assert torch.equal(again.read(everything), expected.read(everything))


def test_processes_and_skipped_images_change_no_byte(tmp_path, small_commits):
    data = write_images(tmp_path / "data")
    (data / "ant" / "004x.png").write_bytes(b"no image")
    one = make(data, tmp_path / "one", bad_images="skip")
    two = make(data, tmp_path / "two", bad_images="skip", workers=2)
    assert one == two
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert sum(len(split["skipped"]) for split in one["splits"].values()) == 1
    assert sum(split["images"] for split in one["splits"].values()) == 40
    assert np.load(tmp_path / "one/train/images.npy").shape[1:] == (3, 16, 16)


def test_a_stopped_preparation_resumes_to_the_same_bytes(tmp_path, small_commits, monkeypatch):
    """Stopped after any number of parts, with a tail beyond the last commit, as a kill leaves it."""
    data = write_images(tmp_path / "data")
    make(data, tmp_path / "whole")
    calls = []

    def failing(path, *rest):
        calls.append(path)
        if len(calls) == 22:  # in the third commit
            raise KeyboardInterrupt
        return read_image(path, *rest)

    monkeypatch.setattr(decode_pool, "read_image", failing)
    with pytest.raises(KeyboardInterrupt):
        make(data, tmp_path / "out")
    monkeypatch.setattr(decode_pool, "read_image", read_image)
    with pytest.raises(InputError, match="is not complete; run the same `flowback prepare` again"):
        load_prepared(tmp_path / "out", 16, 3, "train")
    with (tmp_path / "out/train/images.npy").open("ab") as file:
        file.write(b"half an image")
    with (tmp_path / "out/train/journal.jsonl").open("a") as file:
        file.write('{"items": 24, "ima')
    make(data, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_killed_preparation_resumes_to_the_same_bytes(tmp_path, small_commits, monkeypatch):
    """SIGKILL after the first commit, with two processes decoding; none of them is left behind."""
    data = write_images(tmp_path / "data")
    make(data, tmp_path / "whole")

    def slow(*words):
        time.sleep(0.05)  # so that the kill comes long before the end
        return read_image(*words)

    monkeypatch.setattr(decode_pool, "read_image", slow)
    fork = multiprocessing.get_context("fork")
    running = fork.Process(target=make, args=(data, tmp_path / "out"), kwargs={"workers": 2})
    running.start()
    journal = tmp_path / "out/train/journal.jsonl"
    while running.is_alive() and not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.01)
    children = psutil.Process(running.pid).children()
    running.kill()
    running.join()
    assert len(children) == 2
    assert not (tmp_path / "out/prepared.json").exists()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    monkeypatch.setattr(decode_pool, "read_image", read_image)
    make(data, tmp_path / "out", workers=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_complete_set_is_checked(tmp_path):
    data = write_images(tmp_path / "data")
    first = make(data, tmp_path / "out")
    before = tree(tmp_path / "out")
    assert make(data, tmp_path / "out") == first
    assert tree(tmp_path / "out") == before
    with (tmp_path / "out/train/images.npy").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    with pytest.raises(InputError, match="damaged between images 0 and"):
        make(data, tmp_path / "out")


# --- encoder features ---

FEATURES = replace(BICUBIC, features=FeatureSettings("pooled", None, "0" * 32, 4, 16, 3))


def pooled(images):
    """16 patches of 4 x 4 pixels, their mean colours: (b, 16, 3)."""
    assert len(images) > 0  # networks refuse an empty batch
    return functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)


def test_features_are_those_of_the_stored_images_and_of_their_mirror_images(tmp_path, small_commits):
    """For training images alone; four unreadable ones in a row, which are a part without an image."""
    data = write_images(tmp_path / "data")
    listed = [split.files for split in open_source(str(data), 16, 3, 0.25).values()]
    for name in listed[0][4:8]:
        (data / name).write_bytes(b"no image")
    make(data, tmp_path / "out", FEATURES, encoder=pooled, bad_images="skip")
    images = load_prepared(tmp_path / "out", 16, 3, "train")
    assert len(images) == len(listed[0]) - 4
    everything = torch.arange(len(images))
    pixels = images.read(everything).float() / 127.5 - 1
    for mirror, own in ((False, pixels), (True, pixels.flip(3))):
        found = images.feature_table.rows(everything, torch.full((len(images),), mirror))
        assert torch.equal(found, pooled(own).half())
    test = load_prepared(tmp_path / "out", 16, 3, "test")
    assert test.features is None
    assert not (tmp_path / "out/test/features.npy").exists()
    again = pickle.loads(pickle.dumps(images))
    assert again.features == images.features == FEATURES.features


def test_features_and_pixels_are_checked_alike(tmp_path):
    data = write_images(tmp_path / "data")
    make(data, tmp_path / "out", FEATURES, encoder=pooled)
    with pytest.raises(InputError, match="other settings: features"):
        make(data, tmp_path / "out", encoder=None)
    file = tmp_path / "out/train/features.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged between images 0 and"):
        make(data, tmp_path / "out", FEATURES, encoder=pooled)
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"features.npy is cut short"):
        _ = load_prepared(tmp_path / "out", 16, 3, "train").feature_table


def test_features_beyond_half_precision_are_refused(tmp_path):
    data = write_images(tmp_path / "data")
    with pytest.raises(InputError, match="features have values beyond half precision"):
        make(data, tmp_path / "out", FEATURES, encoder=lambda images: pooled(images) + 7e4)
    assert not (tmp_path / "out/prepared.json").exists()


@pytest.mark.parametrize("settings", [BICUBIC, FEATURES], ids=["pixels", "features"])
def test_the_disk_must_have_room_for_all_columns(tmp_path, monkeypatch, settings):
    """768 bytes of pixels, 16 of label and name's end, 1 of the name, 2 · 16 · 3 · 2 of features."""
    data = write_images(tmp_path / "data")
    train, test = (len(source) for source in open_source(str(data), 16, 3, 0.25).values())
    needed = (train + test) * (768 + 16 + 1) + (train * 192 if settings.features else 0)
    usage = module.shutil.disk_usage(tmp_path)
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=free))  # noqa: B023
        if enough:
            make(data, tmp_path / "enough", settings, encoder=pooled)
        else:
            with pytest.raises(
                InputError, match=r"The set needs 0.0 GB, .* make room, or choose another --out"
            ):
                make(data, tmp_path / "out", settings, encoder=pooled)


def test_large_rows_are_committed_before_they_fill_the_memory(tmp_path, small_commits, monkeypatch):
    """Of 784 bytes a row, four make a part, and two parts a commit; half of that room makes it one."""
    data = write_images(tmp_path / "data")
    commits = []
    for limit in (2**28, 4 * 800):
        monkeypatch.setattr(module, "COMMIT_BYTES", limit)
        found = make(data, tmp_path / f"{limit}")
        commits.append([until for until, *_ in found["splits"]["train"]["commits"]])
    assert np.diff(commits[0], prepend=0).max() == 8
    assert np.diff(commits[1], prepend=0).max() == 4


# --- sources ---


def shards(folder, count=12, labels=True):
    """Three shards of four images, the last for the test, labelled by .cls or .json in turn."""
    images = sorted(write_images(folder / "images", count=count // 2).rglob("*.png"))
    for shard in range(3):
        samples = []
        for index in range(4 * shard, 4 * shard + 4):
            samples.append((f"s{index:03d}.png", images[index].read_bytes()))
            if labels and index % 2:
                samples.append((f"s{index:03d}.cls", str(index % 3).encode()))
            elif labels:
                samples.append((f"s{index:03d}.json", json.dumps({"label": index % 3}).encode()))
        write_shard(folder / ("val-000.tar" if shard == 2 else f"train-{shard:03d}.tar"), samples)
    return images


def test_tar_shards(tmp_path):
    images = shards(tmp_path)
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    make(tmp_path, tmp_path / "out")
    train, test = (load_prepared(tmp_path / "out", 16, 3, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 4)
    assert train.classes == ("x", "y", "z")
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert train.file_name(5) == "s005.png"
    expected = [torch.from_numpy(decode(file, 16, 3).copy()) for file in images]
    assert torch.equal(train.read(torch.arange(8)), torch.stack(expected[:8]))
    assert torch.equal(test.read(torch.arange(4)), torch.stack(expected[8:]))


def test_tar_shards_with_class_folders_and_no_split(tmp_path):
    image = next(write_images(tmp_path / "data", count=1).rglob("*.png")).read_bytes()
    samples = [(f"{name}/{i}.png", image) for name in ("cat", "dog") for i in range(8)]
    write_shard(tmp_path / "all.tar", samples)
    found = make(tmp_path / "all.tar", tmp_path / "out")
    assert found["classes"] == ["cat", "dog"]
    assert sum(split["images"] for split in found["splits"].values()) == 16


def test_labels_file_for_a_flat_test_folder(tmp_path):
    """ImageNet as it comes: class folders for training, and a flat folder with a list for the test."""
    write_images(tmp_path / "data/train")
    flat = write_images(tmp_path / "flat", count=2)
    (tmp_path / "data/val").mkdir()
    for index, file in enumerate(sorted(flat.rglob("*.png"))):
        file.rename(tmp_path / f"data/val/v{index}.png")
    rows = "v0,bee 1 2 3 4\nv1,ant 1 2 3 4 \nv2,bee 0 0 1 1 bee 3 3 4 4\nv3,bee 1 1 1 1"
    (tmp_path / "val.csv").write_text(f"ImageId,PredictionString\n{rows}\n")
    make(tmp_path / "data", tmp_path / "out", labels=tmp_path / "val.csv")
    test = load_prepared(tmp_path / "out", 16, 3, "test")
    assert test.labels.tolist() == [1, 0, 1, 1]
    assert test.classes == ("ant", "bee")


def test_sets_known_by_name(tmp_path):
    settings = Settings(8, 1, "adm", 0.1)
    make("digits", tmp_path / "out", settings)
    for split in ("train", "test"):
        expected = load_images(DataConfig("digits"), 8, 1, split)
        found = load_prepared(tmp_path / "out", 8, 1, split)
        assert torch.equal(found.read(torch.arange(len(found))), expected.pixels)
        assert torch.equal(found.labels, expected.labels)


# --- bad input ---


def labels_of(text):
    def change(folder):
        (folder / "labels.csv").write_text(text)
        for file in list((folder / "ant").iterdir()):
            file.rename(folder / file.name)
        for name in ("ant", "bee"):
            for file in (folder / name).iterdir():
                file.unlink()
            (folder / name).rmdir()

    return change


ROWS = "".join(f"{i:03d}.png,{'ab'[i % 2]}\n" for i in range(20))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ROWS.replace("007.png,b\n", ""), "gives no class for 007.png; add them"),
        (ROWS + "020.png,a\n", "line 21: 020.png is not in"),
        (ROWS + "003.png,a\n", "line 21: 003.png has two classes"),
        (ROWS.replace("005.png,b", "005.png"), "line 6: not `image,class`"),
    ],
)
def test_labels_that_disagree_with_the_images(tmp_path, text, sentence):
    data = write_images(tmp_path / "data")
    labels_of(text)(data)
    with pytest.raises(InputError, match=sentence):
        make(data, tmp_path / "out", labels=data / "labels.csv")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_refused_by_name_and_nothing_is_lost(tmp_path, small_commits):
    data = write_images(tmp_path / "data")
    (data / "bee" / "019x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"019x.png \(empty file\); .* --bad-images skip"):
        make(data, tmp_path / "out")
    assert len((tmp_path / "out/train/journal.jsonl").read_text().splitlines()) > 1
    found = make(data, tmp_path / "out", bad_images="skip")
    assert sum(split["images"] for split in found["splits"].values()) == 40


@pytest.mark.parametrize("complete", [True, False])
def test_a_source_that_changed(tmp_path, complete, small_commits):
    data = write_images(tmp_path / "data")
    if not complete:
        (data / "bee" / "019x.png").write_bytes(b"")
        with pytest.raises(InputError):
            make(data, tmp_path / "out")
    else:
        make(data, tmp_path / "out")
    before = tree(tmp_path / "out")
    Image.new("RGB", (50, 50)).save(data / "ant" / "001.png")
    with pytest.raises(InputError, match=r"changed since .* was prepared from it"):
        make(data, tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("cut", [-1024, -700, -3000])
def test_a_shard_cut_short(tmp_path, cut):
    """Without its end mark, inside of the last image, and inside of one before."""
    shards(tmp_path)
    file = tmp_path / "train-001.tar"
    with tarfile.open(file) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    os.truncate(file, end if cut == -1024 else end + cut)
    with pytest.raises(InputError, match=r"train-001.tar is cut short"):
        make(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_with_labels_for_some(tmp_path):
    shards(tmp_path)
    image = (tmp_path / "images/ant/000.png").read_bytes()
    write_shard(tmp_path / "train-002.tar", [("x.png", image)])
    with pytest.raises(InputError, match="some images have a class"):
        make(tmp_path, tmp_path / "out")


def test_other_settings_and_other_folders(tmp_path):
    data = write_images(tmp_path / "data")
    make(data, tmp_path / "out")
    with pytest.raises(InputError, match=r"other settings: image_size \(was 16, now 8\)"):
        make(data, tmp_path / "out", Settings(8, 3, "bicubic", 0.25))
    with pytest.raises(InputError, match=r"data lies in .*data, the folder of the images"):
        make(data, data)
    (tmp_path / "out/train/notes.txt").touch()
    with pytest.raises(InputError, match=r"holds something else \(.*train/notes.txt\)"):
        make(data, tmp_path / "out")


def test_only_one_process_prepares_into_a_folder(tmp_path):
    data = write_images(tmp_path / "data", count=8)
    with folder_lock(tmp_path / "out"), pytest.raises(InputError, match="is in use by process"):
        make(data, tmp_path / "out")
    make(data, tmp_path / "out")
    with folder_lock(tmp_path / "out"), pytest.raises(InputError, match="is in use by process"):
        make(data, tmp_path / "out")


def test_a_source_that_moved_is_the_same(tmp_path, monkeypatch):
    """Typed from another folder, or moved with its files' times."""
    data = write_images(tmp_path / "data", count=8)
    first = make(data, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert make("data", tmp_path / "out") == first
    data.rename(tmp_path / "moved")
    assert make(tmp_path / "moved", tmp_path / "out") == first


def spoil_labels(split):
    labels = np.load(split / "labels.npy")
    np.save(split / "labels.npy", labels[:-1])


def wrong_labels(split):
    labels = np.load(split / "labels.npy")
    labels[3] = 2
    np.save(split / "labels.npy", labels)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_labels, "labels.npy holds int64"),
        (wrong_labels, "labels outside of the set's 2 classes"),
        (lambda split: os.truncate(split / "images.npy", 5000), "images.npy is cut short"),
        (lambda split: (split / "images.npy").unlink(), "images.npy is missing"),
        (lambda split: (split.parent / "prepared.json").write_text("{"), "prepared.json is damaged"),
    ],
)
def test_a_damaged_set_is_refused(tmp_path, spoil, sentence):
    make(write_images(tmp_path / "data"), tmp_path / "out")
    spoil(tmp_path / "out/train")
    with pytest.raises(InputError, match=sentence):
        load_prepared(tmp_path / "out", 16, 3, "train")


def test_a_set_of_another_size_than_the_models(tmp_path):
    make(write_images(tmp_path / "data"), tmp_path / "out")
    with pytest.raises(
        InputError, match="prepared with --image-size 16 --channels 3, but the model takes 32x32"
    ):
        load_images(DataConfig("prepared", tmp_path / "out"), 32, 3, "train")


def test_animations_are_counted_across_commits_and_kills(tmp_path, small_commits, monkeypatch):
    """prepared.json says how many and which first; a resumed preparation counts those before it, too."""
    data = write_images(tmp_path / "data", count=20)
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("ant/000.gif", "ant/999.gif", "bee/500.webp"):
        frames[0].save(data / name, save_all=True, append_images=frames[1:])
    Image.new("RGB", (32, 32)).save(data / "bee/501.png", icc_profile=b"none")
    settings = replace(BICUBIC, holdout=0.0)
    calls = []

    def failing(path, *rest):
        calls.append(path)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return read_image(path, *rest)

    monkeypatch.setattr(decode_pool, "read_image", failing)
    with pytest.raises(KeyboardInterrupt):
        make(data, tmp_path / "out", settings)
    monkeypatch.setattr(decode_pool, "read_image", read_image)
    summary = make(data, tmp_path / "out", settings)
    assert summary["splits"]["train"]["noted"] == {
        "animation": {"images": 3, "first": ["ant/000.gif", "ant/999.gif", "bee/500.webp"]},
        "profile": {"images": 1, "first": ["bee/501.png"]},
    }
    assert summary["splits"]["train"]["images"] == 44


# --- processes ---


@pytest.mark.parametrize(("platform", "method"), [("linux", "fork"), ("darwin", "spawn"), ("win32", "spawn")])
def test_only_linux_forks(monkeypatch, platform, method):
    """macOS can fork, but its frameworks do not survive it."""
    monkeypatch.setattr(sys, "platform", platform)
    assert decode_pool.start_method() == method


def test_processes_that_are_spawned_decode_the_same(tmp_path, monkeypatch):
    data = write_images(tmp_path / "data", count=3)
    make(data, tmp_path / "forked")
    monkeypatch.setattr(decode_pool, "start_method", lambda: "spawn")
    make(data, tmp_path / "spawned", workers=1)
    assert tree(tmp_path / "spawned") == tree(tmp_path / "forked")
