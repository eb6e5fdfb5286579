"""Pixels: files to 8-bit images of a fixed size, 8-bit values to [-1, 1] and back. The only place for it.

Files, in this order: decode, turn upright by its EXIF orientation, reduce to 8 bits (16-bit values divided by
257, rounded), composite alpha over white, convert from an embedded colour profile to sRGB, convert to grey or
RGB, then bring the short side to the asked size and crop the centre, in one of three ways (all antialiased).
Never flips. Of an animation or a file of several pages, the first image counts, and it is noted. A profile
that is sRGB, within 2 of 255 levels, changes nothing; one that is damaged, or of another kind than the
image, is ignored and noted.

bicubic   one bicubic resize of the centre square; what folders get that were not prepared
adm       ADM's (arXiv 2105.05233): halve by averaging while the short side is at least twice the size, then
          bicubic, then the centre to the pixel; what published references are made with
tarflow   TARFlow's (torchvision's Resize and CenterCrop): bilinear, then the centre to the pixel
"""

from __future__ import annotations

import stat
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from flowback.config import Crop
from flowback.errors import is_utf8, shorten

__all__ = [
    "EXTENSIONS",
    "NOTES",
    "Faults",
    "Note",
    "Rounding",
    "UnreadableImageError",
    "decode",
    "fit",
    "from_levels",
    "note_sentence",
    "picture_size",
    "quantise",
    "read_image",
    "to_bytes",
    "to_levels",
    "to_pil",
    "to_unit_range",
]

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


MOST_PIXELS = 2**27
"""Pixels of an image before it is brought to size; decoded, so many take up to 2 GB."""


LARGE = 2**24
"""Pixels above which a process decodes one image at a time."""


_large = threading.Lock()
_warnings = threading.Lock()  # the filters of warnings are those of all threads


class UnreadableImageError(Exception):
    """A file that holds no usable image; the text is a short reason."""


Note = Literal["animation", "profile"]
"""What a reader of the set should know of an image that was read."""


NOTES: dict[Note, str] = {
    "animation": "several frames or pages, of which the first is used",
    "profile": "a colour profile that is damaged or of another kind than the image, and is ignored",
}
"""What the images with a note have."""


def note_sentence(note: Note, count: int, total: int, names: Sequence[str], where: Path | str) -> str:
    """What is to be said of the ``count`` images, the first of them ``names``, that have a note."""
    more = ", ..." if count > len(names) else ""
    return f"Images with {NOTES[note]}: {count} of {total} in {where} ({', '.join(names)}{more})."


def decode(
    source: Path | bytes, size: int, channels: int, crop: Crop = "bicubic"
) -> UInt8[np.ndarray, "c s s"]:
    """The image in a file, or in a file's bytes: upright, resized and cropped to (channels, size, size).

    Raises:
        UnreadableImageError: no file, no image, damaged, or of a kind without a stated range of values.
    """
    return read_image(source, size, channels, crop)[0]


def read_image(
    source: Path | bytes, size: int, channels: int, crop: Crop = "bicubic"
) -> tuple[UInt8[np.ndarray, "c s s"], tuple[Note, ...]]:
    """As :func:`decode`, with what should be known of the file.

    Raises:
        UnreadableImageError: no file, no image, damaged, or of a kind without a stated range of values.
    """
    with _opened(source) as image, _large if image.width * image.height > LARGE else nullcontext():
        animated = _is_animated(image)
        image.load()
        flat, fits = _flat_srgb(_upright(image))
        has_note: dict[Note, bool] = {"animation": animated, "profile": not fits}
        notes = tuple(note for note, has in has_note.items() if has)
        return _square(flat, size, channels, crop), notes


def picture_size(source: Path | bytes) -> tuple[int, int]:
    """Width and height of the image in a file, which is not decoded.

    Raises:
        UnreadableImageError: no file, no image, or damaged.
    """
    with _opened(source) as image:
        return image.size


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """The image in a file. Whatever goes wrong with it, here or in the body, makes it unreadable."""
    try:
        if isinstance(source, Path):
            _check_entry(source)
        content = BytesIO(source) if isinstance(source, bytes) else source
        with _open_quietly(content) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UnreadableImageError("too many pixels")
            yield image
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
        system = error.strerror if isinstance(error, OSError) else None
        raise UnreadableImageError(f"damaged: {shorten(system or str(error))}") from None


def _open_quietly(content: Path | BytesIO) -> Image.Image:
    """Pillow's own, without its warning of sizes below the limit of this module."""
    with _warnings, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(content, formats=_known_formats())


def _check_entry(file: Path) -> None:
    """Refuse what could wait for ever, and a name that no class, no message and no JSON can hold."""
    if not is_utf8(str(file)):
        raise UnreadableImageError("its name is not UTF-8")
    if not stat.S_ISREG(file.stat().st_mode):
        raise UnreadableImageError("not a file")


def fit(image: Image.Image, size: int, channels: int, crop: Crop = "bicubic") -> UInt8[np.ndarray, "c s s"]:
    """Pixels of an upright image: to 8 bits, over white, to sRGB or grey, short side to ``size``, centre.

    Raises:
        UnreadableImageError: values without a stated range (float, or integers beyond 16 bits).
    """
    return _square(_flat_srgb(image)[0], size, channels, crop)


def _square(image: Image.Image, size: int, channels: int, crop: Crop) -> UInt8[np.ndarray, "c s s"]:
    """Pixels of an 8-bit image without alpha."""
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
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImageError("integer pixels beyond 16 bits")
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


def _is_animated(image: Image.Image) -> bool:
    """Whether the file holds more images than the first; asked before it is loaded, since GIF seeks."""
    try:
        # The further images of an MPO, a photograph by some cameras, are previews of the first.
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # damage behind the first image, which may be whole
        return False


def _flat_srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image in 8 bits, over white and in sRGB; and whether its profile, if it has one, could be used."""
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    grey = image.mode in ("1", "L", "LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = _over_white(image)
    if not profile:
        return image, True
    conversion = _conversion(profile)
    if conversion is None or (conversion.mode == "L" and not grey):
        return image, False
    if (conversion.mode == "CMYK") != (image.mode == "CMYK"):
        return image, False
    if conversion.transform is None:
        return image, True
    image = image if image.mode == conversion.mode else image.convert(conversion.mode)
    converted = ImageCms.applyTransform(image, conversion.transform)
    assert converted is not None  # as it is not done in place
    return converted, True


def _over_white(image: Image.Image) -> Image.Image:
    """The image without alpha, in strips, so that little more than it and the result are held."""
    flat = Image.new("RGB", image.size)
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return flat


class _Conversion(NamedTuple):
    mode: Literal["L", "RGB", "CMYK"]
    """Of the images that the profile is for."""
    transform: ImageCms.ImageCmsTransform | None
    """To sRGB; None where it would change nothing."""


SAME = 2
"""Levels by which a profile may differ from sRGB and pass for it, as other writers' sRGB profiles do."""


@lru_cache(maxsize=64)
def _conversion(profile: bytes) -> _Conversion | None:
    """The way from a profile to sRGB; None if it is damaged, or of a kind that no image here has."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = _PROFILE_MODES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return _Conversion(mode, transform)
        if mode == "L":
            probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        else:
            steps = np.linspace(0, 255, 9).astype(np.uint8)
            colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
            probe = Image.fromarray(colours)
        converted = ImageCms.applyTransform(probe, transform)
        assert converted is not None
        change = np.asarray(converted).astype(int) - np.asarray(probe.convert("RGB"))
    except (ImageCms.PyCMSError, KeyError, OSError, ValueError):
        return None
    return _Conversion(mode, transform if np.abs(change).max() > SAME else None)


_PROFILE_MODES: dict[str, Literal["L", "RGB", "CMYK"]] = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}


def to_unit_range(images: UInt8[Tensor, "*s"] | Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """8-bit values as floats on [-1, 1]; floats are latents, which have their scale already."""
    return images if images.is_floating_point() else from_levels(images.float())


def to_bytes(images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """Images on [-1, 1] as 8-bit values, rounded to nearest; non-finite values become black."""
    return to_levels(images.float().nan_to_num(-1, 1, -1)).round().clamp(0, 255).byte().cpu()


def to_pil(images: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Images on [-1, 1] as Pillow's, grey or RGB: clamped, rounded to 8 bits, non-finite values black.

    Example:
        >>> to_pil(torch.ones(2, 1, 4, 4))[0].getpixel((0, 0))
        255
    """
    pixels = to_bytes(images).movedim(1, -1).numpy()
    return [Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image) for image in pixels]


def from_levels(levels: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Values on the scale of 8 bits, 0 ... 255, on [-1, 1]."""
    return levels / 127.5 - 1


def to_levels(images: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Values on [-1, 1] on the scale of 8 bits, 0 ... 255, not rounded."""
    return (images + 1) * 127.5


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
    stages: Counter[str] = field(default_factory=Counter)
    """Where images first became non-finite, and how many."""

    def merge(self, other: Faults) -> Faults:
        """Both sets together."""
        return Faults(
            self.images + other.images,
            self.nonfinite + other.nonfinite,
            self.out_of_range + other.out_of_range,
            self.clipped + other.clipped,
            [*self.names, *other.names][:_NAMED],
            self.stages + other.stages,
        )

    def sentences(self) -> list[str]:
        """What a reader must know, in words; empty if all is well."""
        named = ", ".join(self.names) + (
            ", ..." if self.nonfinite + self.out_of_range > len(self.names) else ""
        )
        counts = (
            (self.nonfinite, "have values that are not finite"),
            (self.out_of_range, "have values more than 0.5 outside [-1, 1], which are clipped"),
        )
        problems = [f"{count} of {self.images} images {what}" for count, what in counts if count]
        sentences = [f"{'; '.join(problems)}: {named}."] if problems else []
        if self.stages:
            stages = ", ".join(f"{stage} ({count})" for stage, count in sorted(self.stages.items()))
            sentences.append(f"Values first became non-finite in (images in brackets): {stages}.")
        return sentences


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
