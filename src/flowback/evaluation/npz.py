"""Arrays in .npz files: mapped where they are stored, read where they are compressed, and never unpickled.

What a file says of its sizes is compared with the file, and each array with its checksum.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from flowback.errors import InputError, shorten
from flowback.reading import open_regular

__all__ = ["read_npz"]

LIMIT = 4 * 2**30
"""Bytes of the compressed arrays of a file, which have to be in memory."""


def read_npz(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the wanted arrays that a file has, and the names of all that it has.

    Raises:
        InputError: not there, damaged, pickled objects, or too large to be decompressed.
    """
    try:
        with open_regular(path) as raw, zipfile.ZipFile(raw) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            found = {name: entries[name] for name in wanted if name in entries}
            packed = [entry for entry in found.values() if entry.compress_type != zipfile.ZIP_STORED]
            if sum(entry.file_size for entry in packed) > LIMIT:
                raise InputError(
                    f"{path} holds compressed arrays of more than {LIMIT >> 30} GiB; write it with np.savez, "
                    "which does not compress."
                )
            return {name: _array(path, archive, entry) for name, entry in found.items()}, list(entries)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except Exception as error:  # zipfile and NumPy raise nearly anything on damaged files
        raise InputError(f"{path} is no .npz file ({shorten(str(error))}); use another copy.") from None


def _array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as stream:
        first = np.lib.format.read_magic(stream) == (1, 0)
        header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if dtype.hasobject:
            raise InputError(f"{path} holds pickled objects, which could run code; it is not read.")
        start, size = stream.tell(), math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or start + size != entry.file_size:
            raise ValueError(f"{entry.filename} has another size than its header says")
        if entry.compress_type != zipfile.ZIP_STORED or fortran or not size:
            values = np.frombuffer(bytearray(stream.read()), dtype)
            return values.reshape(shape, order="F" if fortran else "C")
        while stream.read(2**20):  # at the end, zipfile compares the checksum
            pass
    with path.open("rb") as raw:  # the entry's own header: 30 bytes, then name and extra field
        raw.seek(entry.header_offset + 26)
        lengths = np.frombuffer(raw.read(4), dtype="<u2")
    return np.memmap(path, dtype, "r", entry.header_offset + 30 + int(lengths.sum()) + start, shape)
