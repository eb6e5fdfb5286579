from __future__ import annotations

import torch

from flowback.data.pixels import Faults, quantise


def test_rounding_is_to_nearest_or_down():
    values = torch.tensor([-1.0, -0.999, 0.0, 0.003, 0.999, 1.0]).view(1, 1, 2, 3)
    nearest = quantise(values, ["a"], Faults())
    down = quantise(values, ["a"], Faults(), "truncate")
    assert nearest.flatten().tolist() == [0, 0, 128, 128, 255, 255]
    assert down.flatten().tolist() == [0, 0, 127, 127, 254, 255]


def test_all_256_levels_survive():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(quantise(levels.float() / 127.5 - 1, ["a"], Faults()), levels)


def test_faults_are_counted_and_named_and_the_set_keeps_its_size():
    images = torch.zeros(6, 1, 4, 4)
    images[1, 0, 0, 0] = torch.nan
    images[2, 0, 0, 0] = torch.inf
    images[3, 0, 0, 0] = -1.7
    images[4, 0, 0, :2] = 1.2  # beyond, but not far
    faults = Faults()
    pixels = quantise(images, [f"seed {i}" for i in range(6)], faults)
    assert pixels.shape == images.shape
    assert pixels[1, 0, 0, 0] == pixels[2, 0, 0, 0] == pixels[3, 0, 0, 0] == 0
    assert pixels[4, 0, 0, 0] == 255
    assert (faults.images, faults.nonfinite, faults.out_of_range, faults.clipped) == (6, 2, 1, 3)
    assert faults.sentences() == [
        "2 of 6 images have values that are not finite; 1 of 6 images have values more than 0.5 outside "
        "[-1, 1], which are clipped: seed 1, seed 2, seed 3."
    ]
    assert Faults().sentences() == []


def test_only_the_first_few_are_named():
    faults = Faults()
    for start in range(0, 20, 4):
        quantise(torch.full((4, 1, 2, 2), 9.0), [str(start + i) for i in range(4)], faults)
    assert faults.out_of_range == 20
    assert faults.names == ["0", "1", "2", "3", "4"]
    assert faults.sentences()[0].endswith("0, 1, 2, 3, 4, ....")
