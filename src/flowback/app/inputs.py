"""What visitors send: pictures, numbers and choices, not trusted in any way."""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowback.checked import require
from flowback.config import ModelConfig
from flowback.data.pixels import UnreadableImageError, decode, picture_size, to_unit_range
from flowback.errors import InputError

__all__ = [
    "EACH",
    "MOST_BYTES",
    "MOST_IMAGES",
    "NONE",
    "Picture",
    "guidance_scale",
    "read_label",
    "read_labels",
    "read_picture",
    "read_seed",
    "whole",
]

EACH, NONE = "each in turn", "no class"
"""Choices beside the classes."""
MOST_IMAGES, MOST_GUIDANCE = 64, 10.0
MOST_BYTES = 8 * 2**20
"""Size of a file that is read."""
MOST_PIXELS = 40_000_000
"""Pixels of a picture that is decoded; so many take some 240 MB for a moment."""


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number in this range.

    Raises:
        InputError: anything else.
    """
    fits = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    require(fits and value == int(value), f"{name} is a whole number from {low} to {high}.")
    return int(value)


def read_seed(value: Any) -> int:
    """The seed of the first image.

    Raises:
        InputError: not a seed, or one that leaves no seeds for the images after it.
    """
    return whole(value, "The seed", 0, 2**32 - 1 - MOST_IMAGES)


def read_label(value: Any, config: ModelConfig) -> int | None:
    """A class id; None is unconditional.

    Raises:
        InputError: no such class.
    """
    if value == NONE or not config.num_classes:
        return None
    return whole(value, "A class", 0, config.num_classes - 1)


def read_labels(value: Any, config: ModelConfig, count: int) -> list[int] | None:
    """Class ids of so many images; None is unconditional.

    Raises:
        InputError: no such class.
    """
    if value == EACH and config.num_classes:
        return [index % config.num_classes for index in range(count)]
    label = read_label(value, config)
    return None if label is None else [label] * count


def guidance_scale(value: Any, labelled: bool) -> float:
    """The scale of guidance.

    Raises:
        InputError: out of range, or guidance where there is no class.
    """
    fits = isinstance(value, (int, float)) and 0 <= value <= MOST_GUIDANCE
    require(fits, f"Guidance is a number from 0 to {MOST_GUIDANCE:g}.")
    require(value == 0 or labelled, "Guidance needs a class: choose one, or set guidance to 0.")
    return float(value)


@dataclass(frozen=True)
class Picture:
    """What a picture field holds."""

    image: Float[Tensor, "1 c s s"] | None
    """On [-1, 1], each value one of the 256 levels; None: the field is empty."""
    redraw: Bool[Tensor, "1 n"]
    """True for each token that the visitor marked."""


def read_picture(text: Any, config: ModelConfig) -> Picture:
    """What a picture field holds, at the flow's size.

    Args:
        text: ``{"image": "data:...;base64,...", "marked": [0, 5]}`` as JSON; "" is an empty field.
        config: the flow's.

    Raises:
        InputError: not such a text, or a file that is too large, no image, or damaged.
    """
    try:
        field = json.loads(text) if text else {}
        url, marked = field.get("image") or "", field.get("marked") or []
        head, _, content = url.partition(",")
        known = all(isinstance(token, int) and 0 <= token < config.tokens for token in marked)
        if not known or (url and not (head.startswith("data:") and head.endswith(";base64"))):
            raise ValueError
        redraw = torch.zeros(1, config.tokens, dtype=torch.bool)
        redraw[0, marked] = True
        if not url:
            return Picture(None, redraw)
        if len(content) > MOST_BYTES * 4 / 3 + 4:
            raise InputError(f"This file is larger than {MOST_BYTES // 2**20} MB; choose a smaller one.")
        data = base64.b64decode(content, validate=True)
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise InputError("This picture did not arrive whole; reload the page, and choose it again.") from None
    return Picture(_decoded(data, config.image_size, config.channels), redraw)


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
