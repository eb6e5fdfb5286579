"""Pictures that visitors send: data URLs, not trusted in any way."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowback.data.pixels import UnreadableImageError, decode, picture_size, to_unit_range
from flowback.errors import InputError

__all__ = ["MOST_BYTES", "Picture", "read_picture"]

MOST_BYTES = 8 * 2**20
"""Size of a file that is read."""
MOST_PIXELS = 40_000_000
"""Pixels of a picture that is decoded; so many take some 240 MB for a moment."""


@dataclass(frozen=True)
class Picture:
    """What a visitor gave."""

    image: Float[Tensor, "1 c s s"]
    """On [-1, 1], each value one of the 256 levels."""
    redraw: Bool[Tensor, "1 n"]
    """True for each token that the visitor marked."""


def read_picture(text: str | None, size: int, channels: int, tokens: int) -> Picture | None:
    """What the page's picture field holds: JSON with a data URL and the marked tokens.

    Args:
        text: ``{"image": "data:...;base64,...", "marked": [0, 5]}``; without an image it is empty.
        size: side of the flow's images.
        channels: of the flow's images.
        tokens: of the flow's images.

    Returns:
        The picture at the flow's size; None for an empty field.

    Raises:
        InputError: not such a text, or a file that is too large, no image, or damaged.
    """
    try:
        field = json.loads(text) if text else {}
        url, marked = field.get("image") or "", field.get("marked") or []
        head, _, content = url.partition(",")
        known = all(isinstance(token, int) and 0 <= token < tokens for token in marked)
        if not known or (url and not (head.startswith("data:") and head.endswith(";base64"))):
            raise ValueError
        redraw = torch.zeros(1, tokens, dtype=torch.bool)
        redraw[0, marked] = True
        if not url:
            return None
        if len(content) > MOST_BYTES * 4 / 3 + 4:
            raise InputError(f"This file is larger than {MOST_BYTES // 2**20} MB; choose a smaller one.")
        data = base64.b64decode(content, validate=True)
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise InputError("This picture did not arrive whole; reload the page, and choose it again.") from None
    return Picture(_decoded(data, size, channels), redraw)


def _decoded(data: bytes, size: int, channels: int) -> Float[Tensor, "1 c s s"]:
    """The image in a file's bytes, read as data sets are."""
    try:
        width, height = picture_size(data)
        if width * height > MOST_PIXELS:
            raise UnreadableImageError("too many pixels")
        pixels = decode(data, size, channels)
    except UnreadableImageError as error:
        reason = str(error).partition(":")[0]  # a decoder's own words may hold anything
        raise InputError(
            f"This file cannot be used: {reason}. Choose a PNG, JPEG or WebP of at most "
            f"{MOST_PIXELS // 1_000_000} million pixels."
        ) from None
    return to_unit_range(torch.from_numpy(pixels.copy())[None])
