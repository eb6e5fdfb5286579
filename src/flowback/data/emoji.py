"""Emoji as a coloured set of images: some 3,600 drawings in nine classes, from two packages of Debian.

The drawings are those of Noto Color Emoji (`fonts-noto-color-emoji`), the classes Unicode's groups
(`emoji-test.txt` of `unicode-data`, UTS #51). A text renderer draws each on white at the font's own size.

Many are variants of one drawing: five tones of skin, a man, a woman and a person. A drawing and all that
resembles it are one piece of content, and a piece is in the training set or in the test set, never in both.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from PIL import Image, ImageDraw, ImageFont, features
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from flowback.config import DataConfig
from flowback.errors import InputError

__all__ = ["content", "read_emoji"]

FONT, LIST = "NotoColorEmoji.ttf", "emoji-test.txt"
"""The files that are needed."""

_FOLDERS = {FONT: Path("/usr/share/fonts/truetype/noto"), LIST: Path("/usr/share/unicode/emoji")}
_PACKAGES = {FONT: "fonts-noto-color-emoji", LIST: "unicode-data"}

_SIZE, _BOX = 109, (136, 128)
"""Pixels of the font's only size, and the width and height of its drawings."""

_SMALL, _ALIKE = 12, 0.05
"""Drawings are alike if, at 12×12 pixels on [0, 1], their root mean square difference is below 0.05."""

_TEST = 5
"""One of so many pieces of content is for the test."""

_PEOPLE = {0x1F468, 0x1F469, 0x1F9D1}
"""Man, woman, person."""

_STYLE = {0x200D, 0xFE0F, 0x2640, 0x2642, *range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4)}
"""Code points that do not change what is drawn: joiners, female and male, tones of skin, hair."""


class _Emoji(NamedTuple):
    text: str
    group: str


def read_emoji(
    data: DataConfig, split: Literal["train", "test"]
) -> tuple[list[Image.Image], list[int], tuple[str, ...]]:
    """Images of 136×136 pixels, labels and class names.

    The files are looked for in ``data.path``; without a path in Debian's folders. Four fifths of the content
    are for training, the same on every machine with the same files.

    Raises:
        InputError: a file is missing or is not what it should be, or Pillow cannot shape text.

    Example:
        >>> content([_Emoji("👩🏽‍🚀", "People"), _Emoji("👨‍🚀", "People"), _Emoji("🐼", "Animals")])
        ['1f9d1 1f680', '1f9d1 1f680', '1f43c']
    """
    font, listed = (_find(name, data) for name in (FONT, LIST))
    emoji = _read_list(listed)
    images = _draw(emoji, font)
    pieces = _pieces(content(emoji), images)
    chosen = [index for index, piece in enumerate(pieces) if _for_test(piece) == (split == "test")]
    classes = tuple(dict.fromkeys(each.group for each in emoji))
    number = {name: index for index, name in enumerate(classes)}
    return [images[i] for i in chosen], [number[emoji[i].group] for i in chosen], classes


def content(emoji: list[_Emoji]) -> list[str]:
    """What each shows, whoever does it: its code points in hexadecimal, without tone of skin and gender."""
    return [
        " ".join(f"{0x1F9D1 if point in _PEOPLE else point:x}" for point in points)
        for each in emoji
        if (points := [p for p in map(ord, each.text) if p not in _STYLE] or [ord(each.text[0])])
    ]


def _find(name: str, data: DataConfig) -> Path:
    path = (data.path or _FOLDERS[name]) / name
    if not path.is_file():
        raise InputError(
            f"{path} is not there; install Debian's package {_PACKAGES[name]}, or give the folder that has "
            f"{FONT} and {LIST} as --data.path."
        )
    return path


def _read_list(path: Path) -> list[_Emoji]:
    """The fully qualified emoji, in Unicode's order; components alone are none."""
    emoji, group = [], ""
    try:
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("# group:"):
                group = line.removeprefix("# group:").strip()
            elif line and not line.startswith("#"):
                points, _, rest = line.partition(";")
                if rest.split("#")[0].strip() == "fully-qualified":
                    emoji.append(_Emoji("".join(chr(int(point, 16)) for point in points.split()), group))
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path} is not Unicode's emoji-test.txt ({error}); install it anew.") from None
    if not emoji:
        raise InputError(f"{path} lists no emoji; it should be Unicode's emoji-test.txt.")
    return emoji


def _draw(emoji: list[_Emoji], font_file: Path) -> list[Image.Image]:
    """Each emoji on a white square."""
    if not features.check("raqm"):
        raise InputError(
            "Pillow has no Raqm here and cannot join the parts of an emoji; install Pillow's wheel from PyPI."
        )
    try:
        # Bytes, because Pillow looks for a file that it cannot read among the system's fonts.
        opened = io.BytesIO(font_file.read_bytes())
        font = ImageFont.truetype(opened, _SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise InputError(f"{font_file} cannot be read as a font ({error}); install it anew.") from None
    images = []
    for each in emoji:
        image = Image.new("RGB", (_BOX[0], _BOX[0]), "white")
        place = (0, (_BOX[0] - _BOX[1]) // 2)
        ImageDraw.Draw(image).text(place, each.text, font=font, embedded_color=True)
        images.append(image)
    return images


def _pieces(contents: list[str], images: list[Image.Image]) -> list[str]:
    """A name for the content of each image: the first of all that are linked by content or by likeness."""
    small = np.stack([np.asarray(image.resize((_SMALL, _SMALL), Image.Resampling.BOX)) for image in images])
    values = small.reshape(len(images), -1).astype(np.float64) / 255
    first = {name: index for index, name in reversed(list(enumerate(contents)))}
    links = [(index, first[name]) for index, name in enumerate(contents)] + _alike(values)
    rows, columns = zip(*links, strict=True)
    graph = coo_matrix((np.ones(len(links)), (rows, columns)), shape=(len(images), len(images)))
    _, component = connected_components(graph, directed=False)
    names: dict[int, str] = {}
    for name, number in zip(contents, component.tolist(), strict=True):
        names.setdefault(number, name)
    return [names[number] for number in component.tolist()]


def _alike(values: Float[np.ndarray, "n d"]) -> list[tuple[int, int]]:
    """Pairs of images that are alike."""
    squares = (values**2).sum(1)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(values), 512):
        part = slice(start, start + 512)
        distances = squares[part, None] + squares[None] - 2 * values[part] @ values.T
        near: Int64[np.ndarray, "k 2"] = np.argwhere(distances < _ALIKE**2 * values.shape[1])
        pairs += [(start + int(i), int(j)) for i, j in near if start + i < j]
    return pairs


def _for_test(piece: str) -> bool:
    """By a hash of its name, so that no generator and no order of images matters."""
    return hashlib.sha256(piece.encode()).digest()[0] % _TEST == 0
