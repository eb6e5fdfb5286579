"""Targets from the original files: another size, the same images, whatever was skipped or mirrored."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from flowback import AlignmentConfig, DataConfig, InputError, ModelConfig, RunConfig
from flowback.alignment import targets as module
from flowback.alignment.targets import make_targets
from flowback.data.images import load_images
from flowback.flow.likelihood import to_unit_range

CONFIG = RunConfig(
    model=ModelConfig(image_size=8, patch_size=4, width=32, head_dim=32, blocks=2, layers=1),
    alignment=AlignmentConfig(strategy="detach", locations=((2, 1),), originals=True),
)


@pytest.fixture
def config(tmp_path):
    """Six photographs of noise, 40 x 40: nothing of their detail is left at 8 x 8."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return dataclasses.replace(CONFIG, data=DataConfig("folder", folder, flip=True, holdout=0.0))


def training_images(config):
    return load_images(config.data, config.model.image_size, 3, "train")


def expected(config, numbers, flipped):
    """Features of the files at the encoder's size: 2 x 2 patches of 16 pixels."""
    pixels = to_unit_range(load_images(config.data, 32, 3, "train").read(torch.tensor(numbers)))
    pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
    return module.load_encoder("efficientnet_lite0")(pixels, 2)


@pytest.mark.parametrize("limit", [module.CACHE_LIMIT, 0], ids=["table", "every step"])
def test_the_encoder_sees_the_files_not_the_small_images(config, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(module, "CACHE_LIMIT", limit)
    images = training_images(config)
    targets = make_targets(config, images, tmp_path / "cache")
    indices, flipped = torch.tensor([4, 1]), torch.tensor([True, False])
    seen = images.read(indices) if targets.originals is None else targets.originals.read(indices)
    assert seen.shape[-1] == (32 if limit == 0 else 8)
    seen = to_unit_range(seen)
    seen = torch.where(flipped[:, None, None, None], seen.flip(3), seen)
    found = targets(indices, flipped, seen)
    torch.testing.assert_close(found, expected(config, [4, 1], flipped))  # fp32, other batch sizes
    small = dataclasses.replace(config, alignment=dataclasses.replace(config.alignment, originals=False))
    other = make_targets(small, images, tmp_path / "cache")
    assert (other(indices, flipped, to_unit_range(images.read(indices))) - found).abs().max() > 0.1


def test_images_that_were_skipped_at_one_size_only_do_not_shift_the_others(config, tmp_path, monkeypatch):
    """A folder too large for memory at the encoder's size keeps its bad files in the list."""
    bad = config.data.path / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, bad_images="skip"))
    images = training_images(config)
    assert len(images) == 5
    monkeypatch.setattr("flowback.data.folder.MEMORY_LIMIT", 6 * 8 * 8 * 3)
    targets = make_targets(config, images, tmp_path / "cache")
    flipped = torch.tensor([False])
    found = targets(torch.tensor([3]), flipped, to_unit_range(images.read(torch.tensor([3]))))
    torch.testing.assert_close(found, expected(config, [4], flipped))


def test_a_file_that_is_gone_is_named(config, tmp_path):
    images = training_images(config)
    (config.data.path / "3.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 6 training images .* 32 x 32 pixels, first 3\.png"):
        make_targets(config, images, tmp_path / "cache")
