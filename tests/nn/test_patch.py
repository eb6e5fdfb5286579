from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowback.nn.patch import patchify, unpatchify


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, 8, 2), (3, 12, 4), (4, 6, 1), (3, 8, 8)])
def test_unpatchify_undoes_patchify_exactly(channels, size, patch):
    images = torch.randn(2, channels, size, size)
    tokens = patchify(images, patch)
    assert tokens.shape == (2, (size // patch) ** 2, channels * patch**2)
    assert torch.equal(unpatchify(tokens, patch), images)


def test_tokens_are_those_of_torch_unfold():
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(patchify(images, 4), F.unfold(images, 4, stride=4).transpose(1, 2))


def test_tokens_come_in_raster_order():
    row_and_column = torch.arange(16).reshape(1, 1, 4, 4)
    assert patchify(row_and_column, 2)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
