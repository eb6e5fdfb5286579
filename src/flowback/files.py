"""Files that are never half-written, JSON that any reader accepts, and the cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from flowback.errors import InputError

__all__ = [
    "cache_folder",
    "check_file",
    "check_folder",
    "check_outside",
    "file_hash",
    "foreign_file",
    "located",
    "no_cache",
    "plain",
    "replacing",
    "write_json",
]

log = logging.getLogger("flowback")


def check_folder(folder: Path, option: str, file: Path | None = None) -> None:
    """Refuse, before the work that fills it, a folder that cannot be made or written.

    Args:
        folder: where something will be written; it need not exist yet.
        option: that names it.
        file: what the user named, where it is a file in ``folder``.

    Raises:
        InputError: a file stands in the way, or the folder may not be written.
    """
    folder = folder.absolute()
    found = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not os.path.isdir(found):
        raise InputError(f"{option} {file or folder} cannot be written: {found} is not a folder.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputError(f"{option} {file or folder} cannot be written: {found} is write-protected.")


def check_file(file: Path, option: str) -> None:
    """Refuse, before the work whose result it takes, a file that cannot be written.

    Raises:
        InputError: it is a folder, or stands in one that :func:`check_folder` refuses.
    """
    if os.path.isdir(file):
        raise InputError(f"{option} {file} is a folder; give the name of a file.")
    check_folder(file.parent, option, file)


def check_outside(out: Path, images: Path) -> None:
    """Refuse to write into a folder of images, at any depth: what lies there would become a class of them.

    Raises:
        InputError: ``out`` is ``images``, or lies in it.
    """
    if out.resolve().is_relative_to(images.resolve()):
        raise InputError(
            f"--out {out} lies in {images}, the folder of the images, and would become a part of them; "
            "choose a place outside."
        )


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; read in parts, so that its size does not matter."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def foreign_file(folder: Path, known: Callable[[str], bool]) -> Path | None:
    """A file in ``folder``, at any depth, that is not ``known`` by its path inside it; None if there is none.

    Files and folders whose name begins with a dot are not looked at: systems and editors leave them.

    Args:
        folder: it need not exist.
        known: takes the path from ``folder`` on, with forward slashes.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(place, name)
            if not name.startswith(".") and not known(file.relative_to(folder).as_posix()):
                return file
    return None


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file, which replaces ``path`` only once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
    try:
        # Not through tempfile, whose files only their owner can read: the umask decides, as for any file.
        with open(temporary, mode.replace("w", "x") + "+", encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, temporary):  # neither means much to users
            error.filename = str(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write :func:`plain` data atomically; other types that JSON does not know are written as text."""
    with replacing(path) as file:
        json.dump(plain(data), file, indent=2, default=str, allow_nan=False)
        file.write("\n")


def plain(data: Any) -> Any:
    """Data that any JSON reader accepts: null for NaN and infinity, lists for arrays and tensors.

    Example:
        >>> import numpy as np
        >>> plain({"nll": float("nan"), "z2": np.ones(2)})
        {'nll': None, 'z2': [1.0, 1.0]}
    """
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if hasattr(data, "tolist"):  # of NumPy or PyTorch, which take seconds to import
        return plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


def cache_folder() -> Path:
    """The folder in the environment variable FLOWBACK_CACHE; by default ``~/.cache/flowback``.

    Raises:
        OSError: the user has no home folder, as in some containers.
    """
    named = os.environ.get("FLOWBACK_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "flowback"
    except RuntimeError:
        raise OSError("the user has no home folder; set FLOWBACK_CACHE to a folder") from None


def no_cache(error: OSError) -> None:
    """Say once that the work goes on without the cache, and why."""
    _say_no_cache(error.strerror or str(error))


@functools.cache
def _say_no_cache(reason: str) -> None:
    log.warning("The cache cannot be used (%s): results are computed, and not kept.", reason)


def located(name: str) -> str:
    """A name as it is found from any folder: that of a folder in full, one on the hub as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name
