"""Images of a source, decoded in order by several processes, a few at a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np

from flowback.config import CodecConfig, Crop
from flowback.data.image_set import FeatureSettings
from flowback.data.pixels import Note, UnreadableImageError, fit, read_image
from flowback.data.sources import Source
from flowback.errors import InputError

__all__ = ["TASK", "Part", "Settings", "decoded", "start_method"]

TASK = 64
"""Images that a process decodes before it hands them over."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a prepared set, beside its source."""

    image_size: int
    channels: int
    crop: Crop
    holdout: float
    codec: CodecConfig | None = None
    """The VAE whose latents are written beside the images."""
    latent: tuple[int, int, int] | None = None
    """Channels, height and width of a latent."""
    features: FeatureSettings | None = None
    """The encoder whose features of the training images are written, too."""


@dataclass(frozen=True)
class Part:
    """Some images of a source, ready to be appended."""

    pixels: np.ndarray
    labels: np.ndarray
    names: list[bytes]
    skipped: list[str]
    noted: dict[Note, list[str]] = field(default_factory=dict)
    """Names of images by what is to be known of them."""
    derived: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What a VAE or an encoder made of the pixels."""


def decoded(source: Source, settings: Settings, start: int, workers: int) -> Generator[Part, None, None]:
    """The images from ``start`` on, in order, at most a few tasks ahead of whoever takes them.

    Args:
        source: the images.
        settings: how they are brought to size.
        start: the first one; a multiple of TASK.
        workers: processes; 0 decodes in this one.

    Raises:
        InputError: a process was killed.
    """
    starts = iter(range(start, len(source), TASK))
    decoder = _Decoder(source, settings)
    if workers == 0:
        yield from map(decoder, starts)
        return
    pool = ProcessPoolExecutor(workers, get_context(start_method()), _begin_process, (decoder, os.getpid()))
    ahead: deque[Future[Part]] = deque()
    try:
        for begin in starts:
            ahead.append(pool.submit(_decode_from, begin))
            if len(ahead) >= 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "A decoding process was killed, perhaps because memory ran out; run the same command again to "
            "continue, with fewer --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_method() -> Literal["fork", "spawn"]:
    """How processes that decode begin.

    Forking costs nothing and shares the listing; the children only decode, and never touch PyTorch. macOS can
    fork, too, but the threads of its own libraries do not survive it; Windows cannot.
    """
    return "fork" if sys.platform == "linux" else "spawn"


class _Decoder:
    """Decodes TASK images from a given one on."""

    def __init__(self, source: Source, settings: Settings) -> None:
        self.source, self.settings = source, settings

    def __call__(self, start: int) -> Part:
        source, settings = self.source, self.settings
        size = settings.image_size
        span = range(start, min(start + TASK, len(source)))
        pixels = np.empty((len(span), settings.channels, size, size), dtype=np.uint8)
        good: list[int] = []
        skipped: list[str] = []
        noted: dict[Note, list[str]] = {}
        for index in span:
            try:
                pixels[len(good)], notes = self._image(index)
                good.append(index)
                for note in notes:
                    noted.setdefault(note, []).append(source.file_name(index))
            except UnreadableImageError as error:
                skipped.append(f"{source.file_name(index)} ({error})")
        labels = np.full(len(good), -1, dtype=np.int64)
        if source.labels is not None:
            labels[:] = source.labels[good].numpy()
        names = [source.file_name(index).encode() + b"\n" for index in good]
        return Part(pixels[: len(good)], labels, names, skipped, noted)

    def _image(self, index: int) -> tuple[np.ndarray, tuple[Note, ...]]:
        settings, content = self.settings, self.source.open(index)
        if isinstance(content, (bytes, Path)):
            return read_image(content, settings.image_size, settings.channels, settings.crop)
        return fit(content, settings.image_size, settings.channels, settings.crop), ()


_decoder: _Decoder | None = None
"""Of a decoding process, which keeps nothing else; never set in the main process."""


def _begin_process(decoder: _Decoder, parent: int) -> None:
    """In a new process: keep the decoder, leave Ctrl-C to the parent, and end when the parent has ended."""
    global _decoder
    _decoder = decoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _decode_from(start: int) -> Part:
    assert _decoder is not None
    return _decoder(start)
