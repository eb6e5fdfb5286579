"""Samples as files: PNG images, a grid, ADM's .npz, and the picture of the way from noise to image.

Files appear whole or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

from flowback.data.pixels import to_bytes
from flowback.errors import InputError, shorten
from flowback.files import replacing

__all__ = ["fonts", "grid", "read_png", "save_grid", "save_npz", "save_png", "save_trajectory"]

OTHER_SCRIPTS = (
    *("Noto Sans CJK JP", "Noto Sans JP", "Noto Sans CJK SC", "Noto Sans SC", "Noto Sans KR"),
    *("Noto Sans Devanagari", "Noto Sans Arabic", "Noto Sans Thai", "WenQuanYi Zen Hei", "Unifont"),
    *("Hiragino Sans", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI"),
)
"""Fonts for scripts that matplotlib's own lacks, on Linux, macOS and Windows."""

_ROWS = 64
"""Row names drawn at once: matplotlib's pictures have less than 2^16 pixels along a side."""


def save_png(image: UInt8[Tensor, "c h w"], path: Path, text: dict[str, object] | None = None) -> None:
    """Write one image, with notes (seed, label, ...) in its text chunks."""
    notes = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        notes.add_text(key, str(value))
    with replacing(path, "wb") as file:
        _picture(image).save(file, format="PNG", pnginfo=notes)


def read_png(path: Path) -> tuple[UInt8[Tensor, "c h w"], dict[str, str]]:
    """An image of :func:`save_png` and its notes.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = np.array(picture)
            notes = {str(key): str(value) for key, value in picture.info.items()}
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise InputError(
            f"{path} is damaged ({shorten(str(error))}); remove it, and draw it again."
        ) from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1), notes


def save_grid(
    images: Float[Tensor, "b c h w"],
    path: Path,
    columns: int,
    gap: int = 2,
    scale: int = 0,
    names: Sequence[str] = (),
) -> None:
    """Write the images as one picture; arguments as in :func:`grid`."""
    save_png(grid(images, columns, gap, scale, names), path)


def grid(
    images: Float[Tensor, "b c h w"], columns: int, gap: int = 2, scale: int = 0, names: Sequence[str] = ()
) -> UInt8[Tensor, "c height width"]:
    """The images as one picture, row after row, on white.

    Args:
        images: on [-1, 1].
        columns: images in a row.
        gap: pixels between images.
        scale: how often each pixel is repeated; 0 enlarges small images to 64 pixels.
        names: one for each row, written to the left of it; none: the images alone.
    """
    pixels = to_bytes(images)
    scale = scale or max(1, 64 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full(
        (channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8
    )
    for index, image in enumerate(pixels):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    if not names:
        return sheet
    strip = _written(names, height + gap, gap).to(sheet)[:channels]  # grey: its channels are equal
    return torch.cat([strip, sheet], dim=2)


def _written(names: Sequence[str], height: int, gap: int) -> UInt8[Tensor, "3 height width"]:
    """Names below each other, black on white, one in ``height`` pixels, with a gap above the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only where it is needed
    from matplotlib.figure import Figure
    from matplotlib.transforms import IdentityTransform

    families = fonts()

    def draw(part: Sequence[str], width: int) -> tuple[np.ndarray, int]:
        """The picture, and the width that its longest name takes."""
        # A quarter of a pixel more, which is cut off: older versions round 2.34 * 100 down to 233.
        figure = Figure(figsize=((width + 0.25) / 100, (len(part) * height + 0.25) / 100), dpi=100)
        canvas = FigureCanvasAgg(figure)
        texts = [
            figure.text(
                gap, (len(part) - row - 0.5) * height, name, transform=IdentityTransform(), va="center",
                fontsize=8, fontfamily=families, parse_math=False,
            )
            for row, name in enumerate(part)
        ]  # fmt: skip
        canvas.draw()
        widest = max(text.get_window_extent().width for text in texts)
        return np.array(canvas.buffer_rgba())[:, :, :3], int(widest) + 3 * gap

    parts = [[_short(name) for name in names[row : row + _ROWS]] for row in range(0, len(names), _ROWS)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands there
        width = max(draw(part, 100)[1] for part in parts)
        written = np.concatenate([draw(part, width)[0] for part in parts])
    return torch.from_numpy(np.pad(written, ((gap, 0), (0, 0), (0, 0)), constant_values=255)).permute(2, 0, 1)


def _short(name: str, most: int = 24) -> str:
    line = " ".join(name.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def fonts() -> list[str]:
    """Matplotlib's own font, and for the signs that it lacks those of other scripts that are installed."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]


def save_trajectory(states: Sequence[Float[Tensor, "b c h w"]], path: Path) -> None:
    """Write the way from noise to image, one row an image: z, after each block, after each step of denoising.

    Noise and intermediate values leave [-1, 1]; each picture but the last two is divided by its own
    largest value so that it can be seen.
    """
    last = len(states) - 2
    shown = [
        s if k >= last else s / s.flatten(1).abs().amax(1).clamp(min=1)[:, None, None, None]
        for k, s in enumerate(states)
    ]
    save_grid(torch.stack(shown, 1).flatten(0, 1), path, columns=len(states))


def save_npz(images: UInt8[Tensor, "b c h w"], path: Path, labels: Sequence[int] | None = None) -> None:
    """Write the file that ADM's evaluator reads: ``arr_0`` uint8 (B, H, W, 3), ``arr_1`` the labels.

    Grey images get three equal channels, which that evaluator needs.
    """
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    arrays = [colour.permute(0, 2, 3, 1).contiguous().numpy()]
    if labels is not None:
        arrays.append(np.asarray(labels, dtype=np.int64))
    with replacing(path, "wb") as file:
        np.savez(file, *arrays)


def _picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
