"""Named sets: sizes, splits and conversions; no network."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from flowback import DataConfig, InputError, image_set, register_dataset
from flowback.data import named_sets
from flowback.data.image_set import labelled
from flowback.data.load import load_images
from flowback.data.named_sets import dataset_names
from flowback.data.sources import open_source

ALL = torch.arange(360)


def test_digits_are_sklearns_pixels():
    originals = {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images}
    train = load_images(DataConfig(), 8, 1, "train")
    test = load_images(DataConfig(), 8, 1, "test")
    assert (len(train), len(test)) == (1437, 360)
    found = {
        image.numpy().tobytes()
        for images in (train, test)
        for image in images.read(torch.arange(len(images)))
    }
    assert found == originals
    assert train.classes == tuple("0123456789")


def test_digits_split_is_fixed_and_stratified():
    test = load_images(DataConfig(), 8, 1, "test")
    counts, total = torch.bincount(test.labels), np.bincount(load_digits().target)
    assert np.abs(counts.numpy() - total * 0.2).max() <= 1
    # Any change of the split changes every published figure: it must be deliberate.
    assert hashlib.blake2b(test.labels.numpy().tobytes(), digest_size=8).hexdigest() == "736fa035b4d000eb"
    assert test.fingerprint == "64cfec9155f21d936511d2b5b2f6418a"
    assert test.fingerprint != load_images(DataConfig(), 8, 1, "train").fingerprint


def test_digits_at_another_size_and_in_colour():
    small = load_images(DataConfig(), 8, 1, "test").read(ALL).float()
    large = load_images(DataConfig(), 16, 3, "test").read(ALL).float()
    assert large.shape == (360, 3, 16, 16)
    assert torch.equal(large[:, 0], large[:, 2])
    # Bicubic keeps the mean up to clipping at 0 and 255: some 3 grey levels on these images.
    assert (large.mean((1, 2, 3)) - small.mean((1, 2, 3))).abs().max() < 8


def test_names_of_images_without_files():
    assert load_images(DataConfig(), 8, 1, "test").file_name(7) == "digits-test-000007"


def test_fake_data_is_deterministic_and_split():
    config = DataConfig("fake")
    train, again = (load_images(config, 8, 3, "train") for _ in range(2))
    test = load_images(config, 8, 3, "test")
    assert train.read(ALL).shape == (360, 3, 8, 8)
    assert torch.equal(train.pixels, again.pixels)
    assert torch.equal(train.labels, again.labels)
    assert int(train.labels.max()) < len(train.classes)
    seen = {image.numpy().tobytes() for image in train.pixels}
    assert not any(image.numpy().tobytes() in seen for image in test.pixels)


def test_mnist_from_disk(tmp_path):
    """torchvision's own file format, written by hand: 3 training and 2 test images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 3), ("t10k", 2)):
        pixels = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([0x801, count], ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(range(count)))
    train = load_images(DataConfig("mnist", path=tmp_path), 14, 1, "train")
    assert train.labels.tolist() == [0, 1, 2]
    assert train.read(torch.tensor([2]))[0].unique().tolist() == [2]
    assert len(load_images(DataConfig("mnist", path=tmp_path), 28, 1, "test")) == 2


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_missing_torchvision_files(tmp_path, name):
    with pytest.raises(InputError, match=f"^{name} is not in .*--data.download"):
        load_images(DataConfig(name, path=tmp_path), 8, 1, "train")


def test_failed_download(tmp_path, monkeypatch):
    import torchvision.datasets as sets

    def offline(self):
        raise OSError("no route to host")

    monkeypatch.setattr(sets.CIFAR10, "download", offline)
    with pytest.raises(InputError, match=r"cifar10 could not be downloaded to .*no route to host"):
        load_images(DataConfig("cifar10", path=tmp_path, download=True), 8, 3, "train")


def test_channels_are_checked():
    with pytest.raises(InputError, match=r"--model\.channels 4"):
        load_images(DataConfig(), 8, 4, "train")


def test_path_alone_means_folder(tmp_path):
    for index in range(4):
        Image.new("L", (4, 4), index).save(tmp_path / f"{index}.png")
    assert len(load_images(DataConfig(path=tmp_path, holdout=0.0), 4, 1, "train")) == 4


@pytest.fixture
def registered():
    """Names that a test registers are gone after it."""
    before = dict(named_sets._LOADERS)
    yield
    named_sets._LOADERS.clear()
    named_sets._LOADERS.update(before)


GREY = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 1, 8, 8)


@pytest.mark.usefixtures("registered")
def test_a_registered_function_is_a_set_by_name(tmp_path):
    asked = []

    @register_dataset("mine")
    def mine(split, image_size, channels, path):
        asked.append((split, image_size, channels, path))
        return torch.from_numpy(GREY), [0, 1, 1], ("cat", "dog")

    data = DataConfig("mine", path=tmp_path)
    images = load_images(data, 8, 1, "test")
    assert asked == [("test", 8, 1, tmp_path)]
    assert (images.name, images.classes, images.labels.tolist()) == ("mine-test", ("cat", "dog"), [0, 1, 1])
    assert np.array_equal(images.pixels.numpy(), GREY)
    assert load_images(data, 4, 3, "test").pixels.shape == (3, 3, 4, 4)  # brought to size and colour
    assert "mine" in dataset_names()

    sources = open_source("mine", 16, 1, 0.1)
    assert sources["train"].labels.tolist() == [0, 1, 1]
    assert np.array_equal(np.asarray(sources["train"].open(2)), GREY[2, 0])  # prepare crops it for itself

    @register_dataset("mine")
    def again(split, image_size, channels, path):
        del split, path
        pixels = torch.zeros(5, channels, image_size, image_size, dtype=torch.uint8)
        return image_set(pixels, name="zeros")

    assert load_images(data, 8, 1).name == "zeros"
    source = open_source("mine", 16, 3, 0.1)["train"]
    assert (len(source), source.labels, source.classes) == (5, None, ())
    assert len(source.fingerprint) == 32


BAD_SETS = {
    "dtype": (lambda: (GREY.astype(np.float32), None, ()), r"images are float32 of the shape \(3, 1, 8, 8\)"),
    "channels": (lambda: (GREY.transpose(0, 2, 3, 1), None, ()), r"the shape \(3, 8, 8, 1\)"),
    "labels": (lambda: (GREY, [0, 1], ()), "give 3 class ids"),
    "none": (lambda: (GREY[:0], None, ()), r"the shape \(0, 1, 8, 8\)"),
    "size": (lambda: image_set(GREY), r"gives images of the shape \(1, 8, 8\), but \(3, 8, 8\) is needed"),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("give", "sentence"), BAD_SETS.values(), ids=BAD_SETS)
def test_what_a_registered_function_must_give(give, sentence):
    register_dataset("mine")(lambda *_: give())
    with pytest.raises(InputError, match=f"^Data set mine.*{sentence}"):
        load_images(DataConfig("mine"), 8, 3, "train")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "folder", "prepared"])
def test_own_names_are_taken(name):
    with pytest.raises(InputError, match=f"'{name}' is a data set of flowback's own"):
        register_dataset(name)


def test_an_unknown_split_is_not_the_other_one():
    with pytest.raises(InputError, match=r"There is no split tset; did you mean test\?"):
        load_images.__wrapped__(DataConfig(), 8, 1, "tset")  # without the check of types that tests have


@pytest.mark.parametrize("path", [None, "here"])
def test_data_without_a_name(tmp_path, path):
    """A path names it, as it does where the name is the default."""
    if path is None:
        with pytest.raises(InputError, match=r"settings name no data: .* name the data with --data NAME or"):
            load_images(DataConfig("none"), 8, 1)
    else:
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
        assert len(load_images(DataConfig("none", path=tmp_path, holdout=0.0), 8, 1)) == 1


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        InputError, match=r"^--data.name fashon-mnist is not known; did you mean fashion-mnist"
    ):
        load_images(DataConfig("fashon-mnist"), 8, 1, "train")
    with pytest.raises(InputError, match=r"--data.name xyz is not known; known: cifar10, .*folder, "):
        load_images(DataConfig("xyz"), 8, 1, "train")


def test_a_limit_is_spread_over_the_training_images_alone():
    whole = load_images(DataConfig(), 8, 1, "train")
    few, test = (load_images(DataConfig(limit=100), 8, 1, split) for split in ("train", "test"))
    assert (len(few), len(test)) == (100, 360)
    assert torch.equal(few.read(torch.tensor([50])), whole.read(torch.tensor([1437 // 2])))
    assert few.fingerprint != whole.fingerprint
    assert len(load_images(DataConfig(limit=5000), 8, 1, "train")) == 1437


def test_labels_are_kept_by_the_same_number_of_each_class():
    images = load_images(DataConfig(), 8, 1, "train")
    kept = labelled(images, 23)
    assert torch.bincount(images.labels[kept]).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert labelled(images, 10_000).all()
    with pytest.raises(
        InputError, match=r"--data\.labelled 9: digits-train has 10 classes, and each needs one"
    ):
        labelled(images, 9)
    with pytest.raises(InputError, match=r"--data\.labelled 9: images has no labels"):
        labelled(image_set(torch.zeros(2, 1, 8, 8)), 9)
