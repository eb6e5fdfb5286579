"""Images to tokens and back; exact inverses, no arithmetic."""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor

__all__ = ["patchify", "unpatchify"]


def patchify(images: Shaped[Tensor, "b c hw hw"], patch: int) -> Shaped[Tensor, "b n d"]:
    """Cut images into square patches: tokens in raster order, each of channels · rows · columns values."""
    b, c, size, _ = images.shape
    grid = size // patch
    x = images.reshape(b, c, grid, patch, grid, patch)
    x = x.permute(0, 2, 4, 1, 3, 5)  # (b, grid, grid, c, patch, patch)
    return x.reshape(b, grid * grid, c * patch * patch)


def unpatchify(tokens: Shaped[Tensor, "b n d"], patch: int) -> Shaped[Tensor, "b c hw hw"]:
    """The images whose :func:`patchify` is ``tokens``."""
    b, n, d = tokens.shape
    grid, c = round(n**0.5), d // patch**2
    x = tokens.reshape(b, grid, grid, c, patch, patch)
    x = x.permute(0, 3, 1, 4, 2, 5)  # (b, c, grid, patch, grid, patch)
    return x.reshape(b, c, grid * patch, grid * patch)
