"""The alignment loss: how far projected flow features point from those of the encoder.

Letters in shapes: b images, n flow tokens, m encoder patches, w width of the flow, f width of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flowback.errors import InputError
from flowback.flow import Location

__all__ = ["AlignmentLoss", "Projector", "alignment_loss", "resample"]


class Projector(nn.Module):
    """TARFlow features to the encoder's space: three linear layers with SiLU between.

    One projector serves every location.

    Args:
        width: of the flow's hidden states.
        hidden: of the two inner layers.
        dim: of the encoder's features.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )

    def forward(self, hidden: Float[Tensor, "b n w"]) -> Float[Tensor, "b n f"]:
        """Projected features, one for each token."""
        return self.layers(hidden)


@dataclass(frozen=True)
class AlignmentLoss:
    """The loss, and where it comes from."""

    loss: Float[Tensor, ""]
    """-mean cosine over images, tokens and locations; in [-1, 1], 0 for unrelated features."""
    cosine: dict[Location, Float[Tensor, ""]]
    """Mean cosine of each location, without a graph."""


def resample(features: Float[Tensor, "b m f"], grid: int) -> Float[Tensor, "b n f"]:
    """Encoder features on a square grid of ``grid`` tokens a side, raster order.

    Rule: a feature belongs to the centre of its patch. Between centres, features are interpolated
    linearly in each axis; outside the outermost centres they stay constant. Towards a coarser grid the
    linear kernel widens by the ratio of the grids, so that every patch keeps its say. A linear ramp stays
    that ramp, except at the border and for coarser grids whose ratio is no whole number.

    Raises:
        InputError: the patches form no square grid.
    """
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1]:
        raise InputError(
            f"The encoder gives {features.shape[1]} patches, no square grid that could be resampled to "
            f"the flow's {grid} x {grid} tokens; feed it square images and drop its prefix tokens."
        )
    if side == grid:
        return features
    maps = features.transpose(1, 2).unflatten(2, (side, side))  # (b, f, side, side)
    maps = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)


def alignment_loss(
    hidden: Mapping[Location, Float[Tensor, "b n w"]], targets: Float[Tensor, "b m f"], projector: nn.Module
) -> AlignmentLoss:
    """-mean over locations and tokens of cos(v, projector(h)) (arXiv 2511.22345).

    The cosine is computed in fp32 at least, whatever the autocast dtype.

    Args:
        hidden: hidden states of the flow by location, tokens in raster order.
        targets: encoder features of the same images, brought to the flow's grid by :func:`resample`.
        projector: maps hidden states to the width of the targets.

    Raises:
        InputError: the targets' grid cannot be resampled.
    """
    tokens = next(iter(hidden.values())).shape[1]
    directions = resample(_at_least_fp32(targets), math.isqrt(tokens))
    cosines: dict[Location, Tensor] = {}
    for location, state in hidden.items():
        projected = projector(state)
        with torch.autocast(projected.device.type, enabled=False):
            cosines[location] = F.cosine_similarity(_at_least_fp32(projected), directions, dim=-1).mean()
    loss = -torch.stack(list(cosines.values())).mean()
    return AlignmentLoss(loss, {location: value.detach() for location, value in cosines.items()})


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
