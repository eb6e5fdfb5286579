"""Sets in memory, what every set answers, and classes matched by name."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flowback
from flowback import InputError, image_set
from flowback.data.image_set import FeatureTable, ImageSet, MemoryImages, PixelSet, Subset, match_classes

RAMP = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)


def named(classes, labels, name="folder"):
    return MemoryImages(name, tuple(classes), torch.tensor(labels), RAMP[: len(labels)])


def test_tensors_are_a_set():
    images = image_set(RAMP, labels=[2, 0, 1, 2], classes=("a", "b", "c"), name="mine")
    assert isinstance(images, flowback.ImageSet)
    assert (len(images), images.name, images.classes) == (4, "mine", ("a", "b", "c"))
    assert images.labels.tolist() == [2, 0, 1, 2]
    assert torch.equal(images.read(torch.tensor([3, 0])), RAMP[[3, 0]])
    floats = image_set(RAMP.float() / 127.5 - 1)
    assert torch.equal(floats.pixels, RAMP)
    assert (floats.labels, floats.classes) == (None, ())
    assert torch.equal(image_set(RAMP.numpy()).pixels, RAMP)
    assert image_set(RAMP, torch.tensor([0, 3, 1, 1])).classes == ("0", "1", "2", "3")


class Dataset(torch.utils.data.Dataset):
    classes = ("cat", "dog")

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_torch_dataset_is_a_set():
    colours = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    pictures = Dataset([(Image.fromarray(colours[0]), 1), (Image.fromarray(colours[1]), torch.tensor(0))])
    images = image_set(pictures)
    assert np.array_equal(images.pixels.numpy(), colours.transpose(0, 3, 1, 2))
    assert (images.labels.tolist(), images.classes) == ([1, 0], ("cat", "dog"))
    tensors = image_set(Dataset([row.float() / 127.5 - 1 for row in RAMP]))
    assert torch.equal(tensors.pixels, RAMP)
    assert tensors.labels is None
    grey = image_set(Dataset([(Image.fromarray(RAMP[0, 0].numpy()), 0)]))
    assert torch.equal(grey.pixels, RAMP[:1])


BAD = {
    "shape": ({"images": RAMP[0]}, r"the shape \(1, 8, 8\); give \(n, channels, h, w\)"),
    "kind": ({"images": RAMP.int()}, "images are torch.int32; give uint8, or floats"),
    "range": ({"images": RAMP.float()}, r"reach from 0 to 255; bring them to \[-1, 1\]"),
    "not a number": ({"images": RAMP.float() * torch.nan}, r"bring them to \[-1, 1\]"),
    "unit range": ({"images": RAMP.float() / 255}, r"look like \[0, 1\]; give 2 \* images - 1"),
    "labels": ({"images": RAMP, "labels": [0, 1]}, "give 4 class ids"),
    "kind of labels": ({"images": RAMP, "labels": torch.zeros(4)}, "give 4 class ids"),
    "ids": (
        {"images": RAMP, "labels": [0, 1, 2, 3], "classes": ("a", "b")},
        "from 0 to 3, but there are 2 classes",
    ),
    "none": ({"images": Dataset([])}, "holds no images"),
    "some": ({"images": Dataset([(RAMP[0], 1), RAMP[1]])}, "1 of the 2 images have a label"),
    "sizes": (
        {"images": Dataset([RAMP[0], RAMP[1][:, :4]])},
        r"image 1 is \(1, 4, 8\), the first one \(1, 8, 8\)",
    ),
}


@pytest.mark.parametrize(("given", "sentence"), BAD.values(), ids=BAD)
def test_bad_images_and_labels(given, sentence):
    with pytest.raises(InputError, match=sentence):
        image_set(**given, name="mine")


class Own(PixelSet):
    """The least that a set must bring."""

    name, classes, labels, fingerprint = "own", (), None, "0"

    def __len__(self):
        return 4

    def read(self, indices):
        return RAMP[indices]

    def file_name(self, index):
        return str(index)


@pytest.mark.parametrize(
    "images",
    [
        Own(),
        image_set(RAMP),
        Subset(Own(), torch.tensor([0, 1, 2, 3])),
        Subset(image_set(RAMP), torch.arange(4)),
    ],
    ids=["own", "memory", "part of own", "part"],
)
def test_every_set_of_pixels_answers_all(images):
    assert isinstance(images, ImageSet)
    assert images.in_pixels is images
    assert images.codec.vae is None
    assert images.feature_table is None
    assert images.skipped == ()
    flipped = torch.tensor([False, True])

    def no_noise():
        raise AssertionError("pixels are not drawn at random")

    drawn = images.draw(images.read_training(torch.tensor([1, 2])), flipped, no_noise)
    assert torch.equal(drawn[0], RAMP[1].float() / 127.5 - 1)
    assert torch.equal(drawn[1], RAMP[2].flip(2).float() / 127.5 - 1)


def test_a_part_of_latents_is_one_of_the_images_too():
    class Latents(Own):
        in_pixels = Own()
        feature_table = FeatureTable(Path("x"), torch.zeros(4, 1, 1, 1))

        def read(self, indices):
            return torch.zeros(len(indices), 1, 8, 8)

        def read_training(self, indices):
            return torch.zeros(len(indices), 2, 2, 1, 8, 8)

        def draw(self, stored, flipped, noise):
            return noise()

    part = Subset(Latents(), torch.tensor([3, 1]))
    assert torch.equal(part.in_pixels.read(torch.tensor([0])), RAMP[3:4])
    assert part.feature_table is None  # its rows are those of the whole set
    stored = part.read_training(torch.tensor([0]))
    assert part.draw(stored, torch.tensor([False]), lambda: torch.ones(1, 1, 8, 8)).sum() == 64


def test_same_names_in_another_order_are_relabelled():
    images = named(("dog", "cat"), [0, 1, 1])
    matched = match_classes(images, ("cat", "dog"))
    assert matched.classes == ("cat", "dog")
    assert matched.labels.tolist() == [1, 0, 0]
    assert matched.fingerprint == images.fingerprint  # of the pixels alone
    assert torch.equal(matched.read(torch.tensor([2])), RAMP[2:3])
    assert matched.in_pixels.labels.tolist() == [1, 0, 0]
    assert pickle.loads(pickle.dumps(matched)).labels.tolist() == [1, 0, 0]
    part = Subset(matched, torch.tensor([1, 0]))
    assert (part.classes, part.labels.tolist()) == (("cat", "dog"), [0, 1])


def test_some_of_the_models_classes_are_relabelled():
    matched = match_classes(named(("eel", "cat"), [0, 1, 0]), ("cat", "dog", "eel"))
    assert (matched.classes, matched.labels.tolist()) == (("cat", "dog", "eel"), [2, 0, 2])


def test_what_needs_no_matching_is_left_alone():
    images = named(("cat", "dog"), [0, 1])
    assert match_classes(images, ("cat", "dog")) is images
    assert match_classes(images, ()) is images
    plain = image_set(RAMP)
    assert match_classes(plain, ("cat", "dog")) is plain
    twice = named(("crane", "dog", "crane"), [0, 1, 2])  # ImageNet has such names
    assert match_classes(twice, ("crane", "dog", "crane")) is twice


def test_other_names_are_refused():
    """A model of {cat, dog} must not score a folder of {dog, eel}, whose number of classes is the same."""
    with pytest.raises(InputError) as caught:
        match_classes(named(("dog", "eel"), [0, 1]), ("cat", "dog"))
    assert str(caught.value) == (
        "folder has 1 of 2 classes that the model does not know: eel (it knows cat, dog); "
        "give images of the model's classes."
    )
    many = named([f"x{k}" for k in range(9)], [0])
    with pytest.raises(InputError, match=r"9 of 9 classes .*: x0, x1, x2, x3, x4 and 4 more \(it knows cat"):
        match_classes(many, ("cat", "dog"))
    with pytest.raises(InputError, match=r"not know: dogs \(did you mean dog\?\)"):
        match_classes(named(("cat", "dogs"), [0, 1]), ("cat", "dog"))
    with pytest.raises(InputError, match="crane names two of them"):
        match_classes(named(("crane",), [0]), ("crane", "dog", "crane"))
