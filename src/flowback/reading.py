"""JSON, YAML and tensors from files that may be damaged, or made to do harm: checked before they are used.

JSON takes at most 64 MiB, YAML 128 KiB and other text 1 GiB. JSON and YAML nest at most 64 deep, and their
numbers are finite. Files of tensors run no code when they are read, and take no more memory than they have
bytes. Nothing that could wait for ever, such as a named pipe, is opened.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from flowback.errors import shorten

__all__ = [
    "is_state_dict",
    "open_regular",
    "parse_json",
    "problem",
    "read_json",
    "read_tensors",
    "read_text",
    "read_yaml",
]

JSON_LIMIT = 64 * 2**20
"""Bytes of a file of JSON."""
YAML_LIMIT = 2**17
"""Bytes of a file of YAML, whose parser is slow."""
TEXT_LIMIT = 2**30
"""Bytes of a file of text, such as the labels of millions of images."""
DEPTH = 64
"""Lists and objects inside one another."""


def open_regular(file: Path) -> IO[bytes]:
    """Open a file for reading, but nothing that could wait for ever.

    Raises:
        OSError: it cannot be opened, or is a named pipe, a device or a socket.
    """
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, open() says so itself
        raise OSError(errno.EINVAL, "Not a file", str(file))
    return open(file, "rb")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        OSError: the file cannot be opened.
        ValueError: no such object, or beyond the bounds of this module.
    """
    value = parse_json(_limited(file, JSON_LIMIT))
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON, a number that is not finite, or nested too deep.

    Example:
        >>> parse_json('{"nll": -0.5}')
        {'nll': -0.5}
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError:  # of JSON, of UTF-8, or of an endless number
        raise ValueError("it is not JSON") from None
    for item in _items(value):
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError("it holds a number that is not finite")
    return value


def read_yaml(file: Path) -> Any:
    """The value in a file of YAML, in UTF-8.

    Raises:
        OSError: the file cannot be opened.
        ValueError: no YAML, or beyond the bounds of this module.
    """
    text = read_text(file, YAML_LIMIT)
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # beside YAML's own, whatever its conversions raise: dates, numbers, binary
        raise ValueError(f"it is not YAML ({shorten(str(error))})") from None
    for _ in _items(value):
        pass
    return value


def read_text(file: Path, limit: int = TEXT_LIMIT) -> str:
    """A file of text in UTF-8, without its mark at the beginning; ends of lines stay as they are.

    Raises:
        OSError: the file cannot be opened.
        ValueError: other text, or more than ``limit`` bytes.
    """
    try:
        return _limited(file, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def problem(error: Exception) -> str:
    """What a reader found wrong with a file, in words: the system's for an OSError, else the reader's own."""
    return str(error.strerror if isinstance(error, OSError) else error)


def _limited(file: Path, limit: int) -> bytes:
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            raise ValueError(f"it has more than {limit >> 10} KiB")
        return stream.read()


def _items(value: Any) -> Iterator[Any]:
    """All that ``value`` holds; at each depth an object once, which YAML's aliases and pickles may share.

    Raises:
        ValueError: nested deeper than :data:`DEPTH`, or in a circle.
    """
    level = [value]
    for _ in range(DEPTH + 2):
        yield from level
        inner = {id(item): item for item in level if isinstance(item, (dict, list, tuple))}
        level = [
            child for item in inner.values() for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError("it is nested too deep")


def read_tensors(file: Path) -> Any:
    """What torch.save wrote, on the CPU: tensors and plain values, read without unpickling code.

    Raises:
        OSError: the file cannot be opened.
        ValueError: damaged, compressed, holds other things, or tensors larger than the file.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if stream.read(4) == b"PK\3\4":
            _check_archive(stream, size)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds: not a file of torch, cut short, or pickled objects
        raise ValueError(f"it does not hold only tensors, or is damaged ({type(error).__name__})") from None
    _check_tensors([item for item in _items(content) if isinstance(item, Tensor)], size)
    return content


def is_state_dict(content: Any) -> bool:
    """Whether it is named tensors, as ``state_dict()`` gives them."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def _check_archive(stream: IO[bytes], size: int) -> None:
    """Refuse an archive that would grow when it is read."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception:  # zipfile raises nearly anything on damaged archives
        raise ValueError("it is cut short or damaged") from None
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise ValueError("it is compressed, which torch.save never does")


def _check_tensors(tensors: Collection[Tensor], size: int) -> None:
    """Refuse tensors that are not what their part of the file holds."""
    held: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError("it holds a tensor that is sparse, quantised or without data")
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError("it holds a tensor larger than its data")
    if sum(held.values()) > size:
        raise ValueError("it holds tensors larger than the file")
