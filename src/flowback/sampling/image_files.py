"""Samples as files: PNG images, a grid, ADM's .npz, and the picture of the way from noise to image.

Files appear whole or not at all. A folder of samples is drawn by any number of processes, and
can be stopped and gone on with. Images are drawn in fixed batches: batch k holds images k·B ... (k+1)·B − 1
whoever draws it, so that an image is the same to the byte whether or not the run was interrupted, and for
every number of processes that compute with the same number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

from flowback.data.pixels import to_bytes
from flowback.errors import InputError
from flowback.files import replacing, write_json

__all__ = [
    "Drawn",
    "SampleFolder",
    "grid",
    "read_png",
    "save_grid",
    "save_npz",
    "save_png",
    "save_trajectory",
]


def save_png(image: UInt8[Tensor, "c h w"], path: Path, text: dict[str, object] | None = None) -> None:
    """Write one image, with notes (seed, label, ...) in its text chunks."""
    notes = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        notes.add_text(key, str(value))
    with replacing(path, "wb") as file:
        _picture(image).save(file, format="PNG", pnginfo=notes)


def read_png(path: Path) -> tuple[UInt8[Tensor, "c h w"], dict[str, str]]:
    """An image of :func:`save_png` and its notes."""
    with Image.open(path) as picture:
        pixels = np.array(picture)
        notes = {str(key): str(value) for key, value in picture.info.items()}
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


Draw = Callable[[list[int], int], Tensor]
"""Images of these numbers; the second argument is the number of the redraw, 0 at first."""


@dataclass(frozen=True)
class Drawn:
    """What one process did for one batch."""

    images: int
    """Images written."""
    redrawn: int
    """Images that had non-finite values and were drawn again."""
    failed: tuple[int, ...]
    """Numbers of the images that stayed non-finite; they were not written."""


class SampleFolder:
    """The images 0 ... count − 1 of one setting as ``000000.png`` and so on.

    Args:
        path: the folder.
        settings: all that decides how the images look; stored as ``sampling.json``.
        count: number of images.
        batch_size: images drawn at once.

    Raises:
        InputError: the folder holds other images.
    """

    def __init__(self, path: Path, settings: dict[str, Any], count: int, batch_size: int) -> None:
        self.path, self.count, self.batch_size = path, count, batch_size
        self.settings = json.loads(json.dumps({**settings, "batch_size": batch_size}, default=str))
        self._check()

    def _check(self) -> None:
        note = self.path / "sampling.json"
        if note.is_file():
            try:
                found = json.loads(note.read_text())
            except ValueError:
                raise InputError(f"{note} is damaged; choose another --out, or empty the folder.") from None
            for key in sorted({*found, *self.settings}):
                if found.get(key) != self.settings.get(key):
                    was, now = found.get(key), self.settings.get(key)
                    raise InputError(
                        f"{self.path} holds images drawn with {key} = {was}, not {now}; "
                        "choose another --out, or the same settings to go on."
                    )
        elif self.path.is_dir() and any(self.path.glob("*.png")):
            raise InputError(f"{self.path} holds other images; choose an empty folder with --out.")

    def file(self, index: int) -> Path:
        """Where an image stands."""
        return self.path / f"{index:06d}.png"

    def begin(self) -> None:
        """Make the folder, note the settings, and remove what a killed run left half-written."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "sampling.json", self.settings)
        for leftover in self.path.glob(".*.png.*"):
            leftover.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Numbers of the images not there yet."""
        return [index for index in range(self.count) if not self.file(index).is_file()]

    def fill(
        self,
        draw: Draw,
        notes: Callable[[int], dict[str, object]],
        missing: Sequence[int],
        rank: int = 0,
        world: int = 1,
        redraws: int = 3,
    ) -> Iterator[Drawn]:
        """Draw this process's share of the ``missing`` images; yields after each batch.

        Args:
            draw: makes the images.
            notes: text stored in an image's file.
            missing: from :meth:`missing`, before any process began: all must share out the same batches.
            rank: number of this process.
            world: number of processes.
            redraws: how often an image with non-finite values is drawn again.
        """
        wanted = set(missing)
        batches = sorted({index // self.batch_size for index in wanted})
        for batch in batches[rank::world]:
            first = batch * self.batch_size
            numbers = list(range(first, min(first + self.batch_size, self.count)))
            images, attempts = _finite_draw(draw, numbers, redraws)
            failed = []
            for number, image, pixels, attempt in zip(
                numbers, images, to_bytes(images), attempts, strict=True
            ):
                if not image.isfinite().all():
                    failed.append(number)
                elif number in wanted:
                    text = {**notes(number), **({"redraw": attempt} if attempt else {})}
                    save_png(pixels, self.file(number), text)
            redrawn = sum(attempt > 0 for attempt in attempts)
            yield Drawn(len(wanted & set(numbers)) - len(failed), redrawn, tuple(failed))


def _finite_draw(draw: Draw, numbers: list[int], redraws: int) -> tuple[Float[Tensor, "b c h w"], list[int]]:
    """Images of these numbers, and which redraw each one is."""
    images, attempts = draw(numbers, 0), [0] * len(numbers)
    for attempt in range(1, redraws + 1):
        bad = torch.nonzero(~images.flatten(1).isfinite().all(1)).flatten().tolist()
        if not bad:
            break
        images = images.clone()
        images[bad] = draw([numbers[row] for row in bad], attempt)
        for row in bad:
            attempts[row] = attempt
    return images, attempts
