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

from flowback.config import AlignmentConfig
from flowback.errors import InputError
from flowback.flow import Location

__all__ = [
    "AlignmentLoss",
    "ConvProjector",
    "Projector",
    "alignment_loss",
    "alignment_weights",
    "make_projector",
    "resample",
    "spatially_normalised",
]


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


class ConvProjector(nn.Module):
    """Flow features to the encoder's space: one 3×3 convolution over the grid (iREPA, arXiv 2512.10794).

    Args:
        width: of the flow's hidden states.
        dim: of the encoder's features.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, dim, 3, padding=1)

    def forward(self, hidden: Float[Tensor, "b n w"]) -> Float[Tensor, "b n f"]:
        """Projected features, one for each token; tokens in raster order."""
        side = math.isqrt(hidden.shape[1])
        maps = self.convolution(hidden.transpose(1, 2).unflatten(2, (side, side)))  # (b, f, side, side)
        return maps.flatten(2).transpose(1, 2)


def make_projector(config: AlignmentConfig, width: int, dim: int) -> Projector | ConvProjector:
    """The projector that ``config`` asks for, from the flow's ``width`` to ``dim`` encoder features."""
    return ConvProjector(width, dim) if config.projector == "conv" else Projector(width, config.hidden, dim)


def spatially_normalised(features: Float[Tensor, "b m f"], gamma: float) -> Float[Tensor, "b m f"]:
    """(v − γ·mean) / (std + 1e-6), over the patches of each image (iREPA, arXiv 2512.10794).

    Patches then differ more: what all of them share is reduced, and every feature has the same scale.
    """
    mean, std = features.mean(1, keepdim=True), features.std(1, keepdim=True)
    return (features - gamma * mean) / (std + 1e-6)


@dataclass(frozen=True)
class AlignmentLoss:
    """The loss, and where it comes from."""

    loss: Float[Tensor, ""]
    """-mean cosine over images, tokens and locations; in [-1, 1], 0 for unrelated features."""
    cosine: dict[Location, Float[Tensor, ""]]
    """Mean cosine of each location, without a graph."""
    image_cosine: Float[Tensor, " b"]
    """Mean cosine of each image over tokens and locations, whatever its weight; without a graph."""


def alignment_weights(
    levels: Float[Tensor, " b"] | None, config: AlignmentConfig
) -> Float[Tensor, " b"] | None:
    """Weights of a batch's images in the alignment loss, by their noise levels; None: all 1.

    If c of b images are inside ``config.levels``, ends included, their weight is b / c and that of the others
    0: the mean over b images of weight · cosine is the mean cosine over those c. If c is 0, it is 0.
    """
    if config.levels is None or levels is None:
        return None
    low, high = config.levels
    inside = ((levels >= low) & (levels <= high)).to(levels.dtype)
    return inside * (len(levels) / inside.sum().clamp_min(1))


def resample(features: Float[Tensor, "b m f"], grid: int) -> Float[Tensor, "b n f"]:
    """Encoder features on a square grid of ``grid`` tokens a side, raster order.

    Rule: a feature belongs to the centre of its patch. Between centres, features are interpolated
    linearly in each axis; outside the outermost centres they stay constant. Towards a coarser grid the
    linear kernel widens by the ratio of the grids, so that every patch counts. A linear ramp stays
    that ramp, except at the border and for coarser grids whose ratio is no whole number.

    Raises:
        InputError: the patches form no square grid.
    """
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1]:
        raise InputError(
            f"The encoder gives {features.shape[1]} patches, which form no square grid to resample to the "
            f"flow's {grid} x {grid} tokens; give it square images and drop its prefix tokens."
        )
    if side == grid:
        return features
    maps = features.transpose(1, 2).unflatten(2, (side, side))  # (b, f, side, side)
    maps = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)


def alignment_loss(
    hidden: Mapping[Location, Float[Tensor, "b n w"]],
    targets: Float[Tensor, "b m f"],
    projector: nn.Module,
    spatial_norm: float | None = None,
    weights: Float[Tensor, " b"] | None = None,
) -> AlignmentLoss:
    """-mean over images, locations and tokens of cos(v, projector(h)) (arXiv 2511.22345).

    The cosine is computed in fp32 at least, whatever the autocast dtype.

    Args:
        hidden: hidden states of the flow by location, tokens in raster order.
        targets: encoder features of the same images, brought to the flow's grid by :func:`resample`.
        projector: maps hidden states to the width of the targets.
        spatial_norm: γ of :func:`spatially_normalised` targets; None takes them as they are.
        weights: of the images, from :func:`alignment_weights`; None: all 1.

    Raises:
        InputError: the targets' grid cannot be resampled.
    """
    tokens = next(iter(hidden.values())).shape[1]
    features = _at_least_fp32(targets)
    if spatial_norm is not None:
        features = spatially_normalised(features, spatial_norm)
    directions = resample(features, math.isqrt(tokens))
    cosines: dict[Location, Tensor] = {}
    of_images = []
    for location, state in hidden.items():
        projected = projector(state)
        with torch.autocast(projected.device.type, enabled=False):
            values = F.cosine_similarity(_at_least_fp32(projected), directions, dim=-1)  # (b, n)
        of_images.append(values.detach().mean(1))
        cosines[location] = values.mean() if weights is None else (weights * values.mean(1)).mean()
    loss = -torch.stack(list(cosines.values())).mean()
    without_graph = {location: value.detach() for location, value in cosines.items()}
    return AlignmentLoss(loss, without_graph, torch.stack(of_images).mean(0))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
