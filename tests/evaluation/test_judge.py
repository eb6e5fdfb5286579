from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from fake_inception import FakeInception
from flowback.alignment.encoders import create_encoder
from flowback.config import DataConfig
from flowback.data.image_set import MemoryImages, Subset
from flowback.data.load import load_images
from flowback.errors import InputError
from flowback.evaluation.judge import Judge
from flowback.evaluation.metrics import Moments, frechet_distance
from flowback.evaluation.protocol import InceptionStatistics, adm_figures, batches, reference_statistics
from flowback.evaluation.references import Reference, load_reference


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))


def image_set(count: int = 30, seed: int = 0) -> MemoryImages:
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    return MemoryImages(f"set {seed}", (), None, pixels.to(torch.uint8))


def reference_of(images: MemoryImages) -> Reference:
    return Reference(images.name, images.fingerprint, images)


def test_a_set_judged_against_itself():
    images, inception = image_set(), FakeInception()
    samples = InceptionStatistics(inception, 30, scores=True, rows=30)
    for batch in batches(images, 7):
        samples.add(batch)
    figures = adm_figures(samples, reference_statistics(reference_of(images), inception, "adm", 11))
    assert abs(figures["fid"]) < 1e-6
    assert abs(figures["sfid"]) < 1e-6
    assert figures["precision"] == figures["recall"] == 1
    assert figures["inception_score"] > 1


def test_order_changes_no_distance():
    inception, reference = FakeInception(), reference_of(image_set(seed=1))
    images = image_set()
    turned = MemoryImages("turned", (), None, images.pixels[torch.randperm(30)])
    found = []
    for side in (images, turned):
        samples = InceptionStatistics(inception, 30, rows=30)
        for batch in batches(side, 8):
            samples.add(batch)
        found.append(adm_figures(samples, reference_statistics(reference, inception, "adm")))
    # the fake's float32 features follow the batch by 1e-7
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_statistics_in_an_npz_replace_those_of_its_images(tmp_path):
    inception, images = FakeInception(), image_set(seed=2)
    colour = images.pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    mean, covariance = np.full(12, 0.5), np.eye(12)
    np.savez(tmp_path / "adm.npz", colour, mu=mean, sigma=covariance)
    made = reference_statistics(load_reference(tmp_path / "adm.npz", 8, 1), inception, "adm")
    assert torch.equal(made.pool.covariance, torch.eye(12, dtype=torch.float64))
    assert made.spatial.count == 30  # sFID and precision come from the images
    assert len(made.rows) == 30


def test_rows_for_precision_are_spread_evenly_whatever_the_batches():
    inception, images = FakeInception(), image_set(50)
    kept = []
    for size in (7, 50):
        made = InceptionStatistics(inception, 50, rows=10)
        for batch in batches(images, size):
            made.add(batch)
        kept.append(made.rows)
    expected = inception(images.pixels).pool[::5]
    for rows in kept:
        torch.testing.assert_close(rows, expected)


def test_statistics_of_a_reference_are_made_once(monkeypatch):
    inception, reference = FakeInception(), reference_of(image_set(seed=3))
    first = reference_statistics(reference, inception, "adm")
    monkeypatch.setattr(InceptionStatistics, "add", lambda *_: pytest.fail("computed again"))
    again = reference_statistics(reference, inception, "adm")
    assert frechet_distance(first.pool, again.pool) == pytest.approx(0, abs=1e-9)
    assert torch.equal(first.rows, again.rows)
    other = reference_of(image_set(seed=4))
    with pytest.raises(pytest.fail.Exception):
        reference_statistics(other, inception, "adm")


def test_a_damaged_file_of_statistics_is_made_again(tmp_path):
    inception, reference = FakeInception(), reference_of(image_set(seed=5))
    first = reference_statistics(reference, inception, "adm")
    (file,) = (tmp_path / "cache" / "statistics").glob("*.tensors")
    file.write_bytes(file.read_bytes()[:100])
    again = reference_statistics(reference, inception, "adm")
    assert torch.equal(first.pool.scatter, again.pool.scatter)


def test_tarflows_protocol_mirrors_half_of_the_references():
    inception, images = FakeInception(), image_set(400, seed=6)
    made = reference_statistics(reference_of(images), inception, "tarflow")
    plain = Moments.of(inception(images.pixels).pool)
    both = Moments.of(inception(torch.cat([images.pixels, images.pixels.flip(-1)])).pool)
    gap = (made.pool.mean - both.mean).norm()
    assert 0 < gap < 0.6 * (plain.mean - both.mean).norm() + 0.05
    assert not torch.allclose(made.pool.mean, plain.mean)
    bare = Reference("bare", "0", None, Moments.of(torch.randn(9, 12)))
    with pytest.raises(InputError, match="--protocol tarflow computes its statistics from images"):
        reference_statistics(bare, inception, "tarflow")


def test_judge_with_and_without_inception():
    reference, encoder = reference_of(image_set(12, seed=7)), create_encoder("efficientnet_lite0")
    plain = Judge(reference, encoder)
    samples = image_set(10, seed=8)
    figures = plain.figures(plain.gather(batches(samples, 4), 10))
    assert list(figures) == ["fd_efficientnet_lite0"]
    assert plain.warnings(10) == [
        "fd_efficientnet_lite0 from 10 samples: it is larger than from more, and comparable only with "
        "figures from 10 samples against the same reference.",
        "10 samples do not fill a covariance of 112 features; fd_efficientnet_lite0 is crude.",
    ]
    assert plain.warnings(50_000) == [
        "12 images of the reference do not fill a covariance of 112 features; fd_efficientnet_lite0 is crude."
    ]
    adm = Judge(reference, encoder, "adm", FakeInception())
    found = adm.figures(adm.gather(batches(samples, 4), 10))
    assert found["fd_efficientnet_lite0"] == pytest.approx(figures["fd_efficientnet_lite0"], rel=1e-6)
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= set(found)
    assert "FID from 10 samples" in adm.warnings(10)[2]
    assert adm.warnings(50_000) == plain.warnings(50_000)
    adm.inception.published = False
    assert "weights are not those of the published file (by its SHA-256): FID" in adm.warnings(50_000)[1]
    statistics = Reference("mu and sigma", "0", None, Moments.of(torch.randn(9, 12)))
    with pytest.raises(InputError, match="no images; give --protocol adm"):
        Judge(statistics, encoder)
    tarflow = Judge(reference, encoder, "tarflow", FakeInception())
    assert "fid_tarflow" in tarflow.figures(tarflow.gather(batches(samples, 4), 10))


def test_distance_in_an_encoders_features_orders_images_by_their_distortion():
    digits = load_images(DataConfig(), 8, 1, "train")
    first, second = Subset(digits, torch.arange(36)), digits.read(torch.arange(36, 72))
    noised = (second.float() + 20 * torch.randn(second.shape)).clamp(0, 255).byte()
    judge = Judge(Reference("first", first.fingerprint, first), create_encoder("efficientnet_lite0"))

    def distance(images):
        return judge.figures(judge.gather(images.split(20), len(images)))["fd_efficientnet_lite0"]

    near = distance(second)
    assert 0 < near < 0.5 * distance(noised)
    assert abs(distance(first.read(torch.arange(36)))) < 1e-4 * near


def test_parts_that_other_processes_gathered_give_the_same_figures():
    judge = Judge(
        reference_of(image_set(14, seed=7)), create_encoder("efficientnet_lite0"), "adm", FakeInception()
    )
    pixels = image_set(25, seed=8).pixels
    whole = judge.figures(judge.gather(pixels.split(25), 25))
    bounds = ((0, 11), (11, 25))
    parts = [judge.gather(pixels[start:end].split(3), 25, start) for start, end in bounds]
    sent = [pickle.loads(pickle.dumps(part)) for part in parts]
    assert sent[0].inception.inception is None  # the network stays where it is
    # fp32 features of other batch sizes
    assert judge.figures(sent[0].merge(sent[1])) == pytest.approx(whole, rel=1e-5)
    kept = [InceptionStatistics(FakeInception(), 25, rows=9, start=start) for start in (0, 0, 11)]
    for made, (start, end) in zip(kept, ((0, 25), *bounds), strict=True):
        made.add(pixels[start:end])
    assert torch.equal(kept[1].merge(kept[2]).rows, kept[0].rows)  # every third image of all
