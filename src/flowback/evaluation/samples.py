"""Images to judge, as the 8-bit values that published figures are computed on, with their faults counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["Faults", "Rounding", "quantise"]

Rounding = Literal["nearest", "truncate"]

FAR = 0.5
"""How far beyond [-1, 1] a value must lie for its image to count as out of range: a quarter of the range."""

_NAMED = 5


@dataclass
class Faults:
    """Images that are no images, counted and named; they stay in the set, whose size is what was asked."""

    images: int = 0
    """Images seen."""
    nonfinite: int = 0
    """Images with NaN or infinite values; these values become black."""
    out_of_range: int = 0
    """Images with values more than 0.5 outside [-1, 1]."""
    clipped: int = 0
    """Values outside [-1, 1], however little."""
    names: list[str] = field(default_factory=list)
    """The first few such images."""

    def merge(self, other: Faults) -> Faults:
        """Both sets together."""
        return Faults(
            self.images + other.images,
            self.nonfinite + other.nonfinite,
            self.out_of_range + other.out_of_range,
            self.clipped + other.clipped,
            [*self.names, *other.names][:_NAMED],
        )

    def sentences(self) -> list[str]:
        """What a reader must know, in words; empty if all is well."""
        named = ", ".join(self.names) + (
            ", ..." if self.nonfinite + self.out_of_range > len(self.names) else ""
        )
        counts = (
            (self.nonfinite, "have values that are not finite"),
            (self.out_of_range, "leave [-1, 1] by far"),
        )
        found = [f"{count} of {self.images} images {what}" for count, what in counts if count]
        return [f"{'; '.join(found)}: {named}."] if found else []


def quantise(
    images: Float[Tensor, "b c h w"], names: Sequence[str], faults: Faults, rounding: Rounding = "nearest"
) -> UInt8[Tensor, "b c h w"]:
    """Images on [-1, 1] as 8-bit values.

    Args:
        images: as sampled, not clamped.
        names: one for each image.
        faults: where broken images are counted.
        rounding: to the nearest value, or down to the one below, as TARFlow's evaluation does.
    """
    finite = images.isfinite()
    nonfinite = ~finite.flatten(1).all(dim=1)
    beyond = torch.where(finite, images.abs() - 1, 0)
    far = (beyond > FAR).flatten(1).any(dim=1) & ~nonfinite
    faults.images += len(images)
    faults.nonfinite += int(nonfinite.sum())
    faults.out_of_range += int(far.sum())
    faults.clipped += int((beyond > 0).sum())
    for row in torch.nonzero(nonfinite | far).flatten().tolist()[: max(0, _NAMED - len(faults.names))]:
        faults.names.append(names[row])
    unit = (torch.where(finite, images, -1.0).float().clamp(-1, 1) + 1) / 2
    return ((unit * 255).round() if rounding == "nearest" else unit * 255).byte()
