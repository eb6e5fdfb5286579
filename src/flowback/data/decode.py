"""One image file, whatever its kind, as uint8 of a fixed size: the only place that converts pixels.

In this order: decode, turn upright by its EXIF orientation, reduce to 8 bits (16-bit values divided by
257, rounded), composite alpha over white, convert to grey or RGB, then resize the short side to the asked
size (bicubic, antialiased) and crop the centre. Never flips. Of an animation, the first frame counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["EXTENSIONS", "UnreadableImageError", "decode", "fit"]

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


def decode(path: Path, size: int, channels: int) -> UInt8[np.ndarray, "c s s"]:
    """The image in a file, upright, resized and cropped to (channels, size, size).

    Raises:
        UnreadableImageError: no file, no image, damaged, or of a kind without a stated range of values.
    """
    try:
        with Image.open(path, formats=_known_formats()) as image:
            image.load()
            return fit(_upright(image), size, channels)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise UnreadableImageError("empty file" if empty else "not an image") from None
    except Image.DecompressionBombError:
        raise UnreadableImageError("too many pixels") from None
    except FileNotFoundError:
        raise UnreadableImageError("no such file") from None
    except PermissionError:
        raise UnreadableImageError("not permitted") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UnreadableImageError(f"damaged: {error}") from None


def fit(image: Image.Image, size: int, channels: int) -> UInt8[np.ndarray, "c s s"]:
    """Pixels of an upright image: to 8 bits, over white, to grey or RGB, short side to ``size``, centre.

    Raises:
        UnreadableImageError: values without a stated range (float, or integers beyond 16 bits).
    """
    image = _eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    # Resize and crop in one step: the filter still sees the pixels outside of the box, and a very long
    # image is never blown up as a whole.
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _known_formats() -> list[str]:
    """The formats of this list that the installed Pillow can open; an unknown one would be an error."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
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
