"""MNIST and its like, from small idx files written here; and Debian's Fashion-MNIST where it is installed."""

import gzip

import numpy as np
import pytest
import torch

from flowback import DataConfig, InputError, load_images
from flowback.data import mnist as module
from flowback.data.mnist import MNIST_LIKE, read_idx

RANDOM = np.random.default_rng(0)
PIXELS = {
    split: RANDOM.integers(0, 256, (count, 28, 28), np.uint8) for split, count in (("train", 5), ("test", 3))
}
LABELS = {"train": bytes([0, 3, 9, 1, 2]), "test": bytes([9, 0, 4])}
PREFIX = {"train": "train", "test": "t10k"}


def idx(values):
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.tobytes()


def write(folder, prefixes=PREFIX, pack=False):
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in prefixes.items():
        contents = {
            f"{prefix}-images-idx3-ubyte": idx(PIXELS[split]),
            f"{prefix}-labels-idx1-ubyte": idx(np.frombuffer(LABELS[split], np.uint8)),
        }
        for name, content in contents.items():
            (folder / f"{name}.gz" if pack else folder / name).write_bytes(
                gzip.compress(content) if pack else content
            )


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    """Neither Debian's packages nor what the user downloaded."""
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("mine", "mine"),
        ("mine/FashionMNIST/raw", "mine"),
        ("debian/fashion-mnist", None),
        ("cache/FashionMNIST/raw", None),
    ],
    ids=["files", "torchvision", "debian", "cache"],
)
def test_files_are_found_and_read_as_they_are(tmp_path, place, path, pack):
    write(tmp_path / place, pack=pack)
    data = DataConfig("fashion-mnist", path=path and tmp_path / path)
    for split in ("train", "test"):
        images = load_images(data, 28, 1, split)
        assert images.name == f"fashion-mnist-{split}"
        assert np.array_equal(images.pixels[:, 0].numpy(), PIXELS[split])
        assert images.labels.tolist() == list(LABELS[split])
    assert images.classes[0] == "T-shirt/top"
    assert images.classes[9] == "Ankle boot"


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_the_others_lie_in_torchvisions_folders(tmp_path, name):
    write(tmp_path / MNIST_LIKE[name].torchvision / "raw")
    images = load_images(DataConfig(name, path=tmp_path), 28, 1, "test")
    assert np.array_equal(images.pixels[:, 0].numpy(), PIXELS["test"])


def test_emnist_is_turned_upright(tmp_path):
    write(tmp_path, {split: f"emnist-balanced-{split}" for split in PIXELS}, pack=True)
    images = load_images(DataConfig("emnist", path=tmp_path), 28, 1, "train")
    assert np.array_equal(images.pixels[:, 0].numpy(), PIXELS["train"].transpose(0, 2, 1))
    assert len(images.classes) == 47


def test_classes_are_torchvisions():
    import torchvision.datasets as sets

    for kind in MNIST_LIKE.values():
        theirs = getattr(sets, kind.torchvision)
        names = theirs.classes_split_dict[kind.part] if kind.part else theirs.classes
        assert tuple(names) == kind.classes


@pytest.mark.parametrize("path", [True, False])
def test_a_missing_set_says_what_to_do(tmp_path, path):
    data = DataConfig("fashion-mnist", path=tmp_path if path else None)
    with pytest.raises(InputError) as caught:
        load_images(data, 28, 1, "train")
    folders = (
        f"{tmp_path} or {tmp_path}/FashionMNIST/raw"
        if path
        else f"{tmp_path}/debian/fashion-mnist or {tmp_path}/cache/FashionMNIST/raw"
    )
    assert str(caught.value) == (
        f"fashion-mnist is not in {folders}; install the Debian package dataset-fashion-mnist, "
        "say where its idx files lie with --data.path, or fetch it with --data.download."
    )
    with pytest.raises(InputError, match=r"^kmnist is not in .*; say where"):
        load_images(DataConfig("kmnist", path=tmp_path), 28, 1, "train")


@pytest.mark.parametrize(("name", "options"), [("fashion-mnist", {}), ("emnist", {"split": "balanced"})])
def test_download_is_torchvisions(tmp_path, monkeypatch, name, options):
    import torchvision.datasets as sets

    kind = MNIST_LIKE[name]
    asked = []

    def fetch(root, download, **given):
        asked.append((root, download, given))
        prefixes = {split: f"emnist-balanced-{split}" for split in PIXELS} if kind.part else PREFIX
        write(tmp_path / kind.torchvision / "raw", prefixes)

    monkeypatch.setattr(sets, kind.torchvision, fetch)
    data = DataConfig(name, path=tmp_path, download=True)
    assert len(load_images(data, 28, 1, "test")) == 3
    load_images(data, 28, 1, "train")  # which is there by now
    assert asked == [(str(tmp_path), True, options)]

    def offline(root, download, **given):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(sets, kind.torchvision, offline)
    with pytest.raises(InputError, match=f"{name} could not be downloaded to .*no route to host"):
        load_images(DataConfig(name, path=tmp_path / "other", download=True), 28, 1, "test")


WHOLE = idx(PIXELS["train"])
DAMAGED = {
    "other dimensions": (idx(np.zeros(5, np.uint8)), "is not an idx file of bytes in 3 dimensions"),
    "floats": (bytes((0, 0, 13, 3)) + WHOLE[4:], "is not an idx file of bytes in 3 dimensions"),
    "text": (b"<html>not found</html>", "is not an idx file of bytes in 3 dimensions"),
    "empty": (b"", "is not an idx file of bytes in 3 dimensions"),
    "header": (WHOLE[:9], "is not an idx file of bytes in 3 dimensions"),
    "cut short": (WHOLE[:-1], "holds 3919 values, but its header says 3920"),
    "too long": (WHOLE + b"\0", "holds 3921 values, but its header says 3920"),
    "gzip cut short": (gzip.compress(WHOLE)[:-40], "cannot be read"),
    "gzip damaged": (gzip.compress(WHOLE)[:200] + bytes(50) + gzip.compress(WHOLE)[250:], "cannot be read"),
}


@pytest.mark.parametrize(("content", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_named(tmp_path, content, sentence):
    write(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file} {sentence}.*; use another copy"):
        load_images(DataConfig("mnist", path=tmp_path), 28, 1, "train")
    assert len(load_images(DataConfig("mnist", path=tmp_path), 28, 1, "test")) == 3


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2, 3, 10]], ids=["fewer", "beyond"])
def test_labels_of_another_set(tmp_path, labels):
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte does not hold the labels of .*images"):
        load_images(DataConfig("mnist", path=tmp_path), 28, 1, "train")


def test_debians_fashion_mnist(monkeypatch):
    monkeypatch.undo()
    folder = module.DEBIAN / "fashion-mnist"
    if not folder.is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    assert read_idx(folder / "train-images-idx3-ubyte.gz", 3).shape == (60_000, 28, 28)
    images = load_images(DataConfig("fashion-mnist"), 28, 1, "test")
    assert len(images) == 10_000
    assert torch.bincount(images.labels).tolist() == [1000] * 10
    # The first test image of Fashion-MNIST is an ankle boot.
    assert images.classes[int(images.labels[0])] == "Ankle boot"
