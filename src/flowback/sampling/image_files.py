"""Samples as files: PNG images, a grid, ADM's .npz, and the picture of the way from noise to image.

Files appear whole or not at all.
"""

from __future__ import annotations

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

__all__ = ["grid", "read_png", "save_grid", "save_npz", "save_png", "save_trajectory"]


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
    images: Float[Tensor, "b c h w"], path: Path, columns: int, gap: int = 2, scale: int = 0
) -> None:
    """Write the images as one picture; arguments as in :func:`grid`."""
    save_png(grid(images, columns, gap, scale), path)


def grid(
    images: Float[Tensor, "b c h w"], columns: int, gap: int = 2, scale: int = 0
) -> UInt8[Tensor, "c height width"]:
    """The images as one picture, row after row, on white.

    Args:
        images: on [-1, 1].
        columns: images in a row.
        gap: pixels between images.
        scale: how often each pixel is repeated; 0 enlarges small images to 64 pixels.
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
    return sheet


def save_trajectory(states: Sequence[Float[Tensor, "b c h w"]], path: Path) -> None:
    """Write the way from noise to image, one row an image: z, after each block, denoised.

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
