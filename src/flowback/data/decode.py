"""One image file, whatever its kind, as uint8 of a fixed size: the only place that converts pixels.

In this order: decode, turn upright by its EXIF orientation, reduce to 8 bits (16-bit values divided by
257, rounded), composite alpha over white, convert to grey or RGB, then bring the short side to the asked
size and crop the centre, in one of three ways (all antialiased). Never flips. Of an animation, the first
frame counts.

bicubic   one bicubic resize of the centre square; what folders get that were not prepared
adm       ADM's (arXiv 2105.05233): halve by averaging while the short side is at least twice the size, then
          bicubic, then the centre to the pixel; what published references are made with
tarflow   TARFlow's (torchvision's Resize and CenterCrop): bilinear, then the centre to the pixel
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

__all__ = ["EXTENSIONS", "Crop", "UnreadableImageError", "decode", "fit"]

Crop = Literal["bicubic", "adm", "tarflow"]
"""How an image becomes a square of the asked size."""

_FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
EXTENSIONS = frozenset(extension for known in _FORMATS.values() for extension in known)
"""Endings of the files that count as images, in lower case."""


class UnreadableImageError(Exception):
    """A file that holds no usable image; the text is a short reason."""


def decode(
    source: Path | bytes, size: int, channels: int, crop: Crop = "bicubic"
) -> UInt8[np.ndarray, "c s s"]:
    """The image in a file, or in a file's bytes: upright, resized and cropped to (channels, size, size).

    Raises:
        UnreadableImageError: no file, no image, damaged, or of a kind without a stated range of values.
    """
    try:
        with Image.open(
            BytesIO(source) if isinstance(source, bytes) else source, formats=_known_formats()
        ) as image:
            image.load()
            return fit(_upright(image), size, channels, crop)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        empty = not source if isinstance(source, bytes) else source.stat().st_size == 0
        raise UnreadableImageError("empty file" if empty else "not an image") from None
    except Image.DecompressionBombError:
        raise UnreadableImageError("too many pixels") from None
    except FileNotFoundError:
        raise UnreadableImageError("no such file") from None
    except PermissionError:
        raise UnreadableImageError("not permitted") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UnreadableImageError(f"damaged: {error}") from None


def fit(image: Image.Image, size: int, channels: int, crop: Crop = "bicubic") -> UInt8[np.ndarray, "c s s"]:
    """Pixels of an upright image: to 8 bits, over white, to grey or RGB, short side to ``size``, centre.

    Raises:
        UnreadableImageError: values without a stated range (float, or integers beyond 16 bits).
    """
    image = _eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if crop == "adm":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    filter_ = Image.Resampling.BILINEAR if crop == "tarflow" else Image.Resampling.BICUBIC
    # Resize and crop in one step: the filter still sees the pixels outside of the box, and a very long
    # image is never blown up as a whole.
    image = image.resize((size, size), filter_, box=_box(image.size, size, crop))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _box(sides: tuple[int, int], size: int, crop: Crop) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part that becomes the square, in pixels of the image."""
    short = min(sides)
    spans = []
    for side in sides:
        if crop == "bicubic":
            start, length = (side - short) / 2, float(short)
        else:  # the side after the resize is whole, and so is the margin that is cut off
            whole = side * size / short
            resized = round(whole) if crop == "adm" else int(whole)
            margin = (resized - size) // 2 if crop == "adm" else round((resized - size) / 2)
            start, length = margin * side / resized, size * side / resized
        spans.append((start, min(start + length, side)))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


@lru_cache(maxsize=1)
def _known_formats() -> list[str]:
    """The formats of this list that the installed Pillow can open; an unknown one would be an error."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # which would copy it
    except Exception:  # a damaged EXIF block, beside pixels that have already been read
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImageError("float pixels without a stated range")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImageError("integer pixels beyond 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
