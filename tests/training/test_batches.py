import dataclasses

import pytest
import torch

from flowback.config import AlignmentConfig
from flowback.data.image_set import labelled
from flowback.data.load import load_images
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError
from flowback.training.batches import _items, batches, generator, global_indices

CPU = torch.device("cpu")


def first(images, config, step=0, rank=0, processes=1):
    return next(batches(images, config, step, rank, processes, CPU))


def test_each_epoch_is_a_permutation_and_the_next_one_differs():
    indices = global_indices(seed=0, length=10, seen=0, count=30)
    for epoch in indices.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert indices[:10].tolist() != indices[10:20].tolist()


def test_the_stream_does_not_depend_on_where_it_is_cut():
    whole = global_indices(seed=3, length=7, seen=0, count=24)
    parts = [global_indices(seed=3, length=7, seen=s, count=4) for s in range(0, 24, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_generators_of_different_keys_differ():
    draws = {torch.rand(1, generator=generator("cpu", *key)).item() for key in [(0, 0), (0, 1), (1, 0)]}
    assert len(draws) == 3


def test_two_processes_see_the_halves_of_the_batch_that_one_sees(config, digits):
    whole = first(digits, config, step=5)
    halves = [first(digits, config, step=5, rank=r, processes=2) for r in range(2)]
    for name in ("indices", "flipped", "clean", "noised", "labels", "drop"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name


def test_a_stream_started_late_equals_the_rest_of_one_started_early(config, digits):
    early = list(batches(digits, config, 0, 0, 1, CPU))
    late = list(batches(digits, config, 9, 0, 1, CPU))
    assert len(early) == 12
    assert len(late) == 3
    for a, b in zip(early[9:], late, strict=True):
        assert torch.equal(a.noised, b.noised)
        assert torch.equal(a.drop, b.drop)


def test_workers_change_nothing(config, digits):
    """The same batches from a data-loader process as from the training process."""
    inside = first(digits, config)
    stream = batches(
        digits, dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1)), 0, 0, 1, CPU
    )
    assert torch.equal(next(stream).noised, inside.noised)


def test_mirrored_images_are_marked_and_noise_has_its_size(config, digits):
    batch = first(digits, config)
    plain = to_unit_range(digits.read(batch.indices))
    assert batch.flipped.any()
    assert not batch.flipped.all()
    assert torch.equal(batch.clean[batch.flipped], plain[batch.flipped].flip(3))
    assert torch.equal(batch.clean[~batch.flipped], plain[~batch.flipped])
    # 1,024 normal values: the sample deviation is within 10 % of sigma but for 1 seed in 10^5.
    assert abs((batch.noised - batch.clean).std() / config.model.noise_std - 1) < 0.1


def test_uniform_noise_dequantises(config, digits):
    model = dataclasses.replace(config.model, noise="uniform")
    batch = first(digits, dataclasses.replace(config, model=model))
    levels = (batch.noised + 1) * 128
    assert torch.equal(levels.floor(), ((batch.clean + 1) * 127.5).round())
    assert float(levels.frac().std()) > 0.2  # uniform on [0, 1): 0.289


def test_labels_are_dropped_at_the_stated_rate(config, digits):
    train = dataclasses.replace(config.train, label_drop=0.25, batch_size=1000)
    batch = first(digits, dataclasses.replace(config, train=train))
    # 1,000 draws at 0.25 have deviation 0.0137; 4 deviations.
    assert abs(batch.drop.float().mean() - 0.25) < 0.055


def test_the_encoder_sees_the_same_images_at_its_own_size(config, digits):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=True))
    larger = load_images(config.data, 16, 1, "train")
    batch = next(batches(digits, config, 0, 0, 1, CPU, larger))
    assert batch.flipped.any()
    plain = to_unit_range(larger.read(batch.indices))
    assert torch.equal(batch.seen, torch.where(batch.flipped[:, None, None, None], plain.flip(3), plain))
    assert torch.equal(batch.clean, first(digits, config).clean)
    assert torch.equal(first(digits, config).seen, batch.clean)


def test_images_without_a_label_are_always_seen_without(config, digits):
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, labelled=20))
    kept = labelled(digits, 20)
    plain, found = (next(batches(digits, each, 5, 0, 1, CPU)) for each in (config, few))
    assert torch.equal(found.drop, plain.drop | ~kept[found.indices])
    assert found.drop.sum() > plain.drop.sum()
    assert torch.equal(found.noised, plain.noised)


def test_a_connection_that_a_dying_worker_breaks_is_said_and_lets_the_loader_go():
    class Loader:
        def __iter__(self):
            yield "a batch"
            raise ConnectionResetError(104, "Connection reset by peer")

    items = _items(Loader())
    assert next(items) == "a batch"
    with pytest.raises(InputError, match=r"A process that decodes images died \(.*reset by peer\)") as error:
        next(items)
    assert error.value.__context__ is None  # its traceback would hold the loader, and so its workers


@pytest.fixture
def ranged(config):
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, noise="range", noise_min=0.05, noise_max=0.5)
    )


def test_every_image_has_noise_of_its_own_level(ranged, digits):
    batch = first(digits, ranged)
    assert len(set(batch.levels.tolist())) == 16
    normal = (batch.noised - batch.clean) / batch.levels[:, None, None, None]
    # 1,024 normal values: the sample deviation is within 10 % of 1 but for 1 seed in 10^5.
    assert abs(normal.std() - 1) < 0.1
    assert torch.equal(
        first(digits, ranged, step=3).levels, list(batches(digits, ranged, 2, 0, 1, CPU))[1].levels
    )
    halves = [first(digits, ranged, step=5, rank=r, processes=2) for r in range(2)]
    whole = first(digits, ranged, step=5)
    for name in ("levels", "noised"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name


def test_levels_are_drawn_as_asked(ranged, digits):
    """4,000 draws in [0.05, 0.5]: the mean's deviation is 0.13 / sqrt(4000) = 0.002 for uniform levels."""
    many = dataclasses.replace(ranged.train, batch_size=4000)
    for kind, mean in {"uniform": 0.275, "square": 0.336, "log": 0.195}.items():
        train = dataclasses.replace(many, levels=kind)
        levels = first(digits, dataclasses.replace(ranged, train=train)).levels
        assert abs(levels.mean() - mean) < 0.008, kind
        assert 0.05 <= levels.min() < 0.07
        assert 0.47 < levels.max() <= 0.5
    assert (
        first(
            digits, dataclasses.replace(ranged, model=dataclasses.replace(ranged.model, noise="gaussian"))
        ).levels
        is None
    )


def test_images_are_aligned_by_their_level_in_the_whole_step(ranged, digits):
    """So that the mean over all images is 1, in however many processes."""
    alignment = AlignmentConfig(levels=(0.2, 0.4))
    some = dataclasses.replace(ranged, alignment=alignment)
    whole = first(digits, some, step=5)
    inside = (whole.levels >= 0.2) & (whole.levels <= 0.4)
    assert 0 < inside.sum() < 16
    torch.testing.assert_close(whole.alignment_weights, inside * (16 / inside.sum()))
    halves = [first(digits, some, step=5, rank=r, processes=2) for r in range(2)]
    assert torch.equal(torch.cat([half.alignment_weights for half in halves]), whole.alignment_weights)
    assert torch.equal(whole.noised, first(digits, ranged, step=5).noised)
    assert first(digits, ranged).alignment_weights is None
