"""A file that grows by appended rows, and can be cut back to what it held: .npy, or bare bytes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Column"]

HEADER = 128
"""Bytes of the header: NumPy pads it so that a growing number of rows never changes its length."""


class Column:
    """Rows of one dtype and shape in a file; `seal` brings a .npy file's header up to date.

    Args:
        path: the file; what it holds already is kept. Only one that ends in .npy has a header.
        dtype: of the rows.
        shape: of one row.
    """

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = np.dtype(dtype), shape
        self.start = HEADER if path.suffix == ".npy" else 0
        self.row = self.dtype.itemsize * math.prod(shape)
        self.file = path.open("r+b" if path.exists() else "w+b")

    def holds(self, rows: int) -> bool:
        """Whether the file is long enough for so many rows."""
        return os.fstat(self.file.fileno()).st_size >= self.start + rows * self.row

    def keep(self, rows: int) -> None:
        """Cut the file to its first ``rows`` rows, and append after them."""
        self.file.truncate(self.start + rows * self.row)
        self.file.seek(0, os.SEEK_END)

    def append(self, rows: np.ndarray) -> None:
        """Write rows at the end."""
        assert rows.dtype == self.dtype
        assert rows.shape[1:] == self.shape
        self.file.write(np.ascontiguousarray(rows).data)

    def read(self, first: int, until: int) -> bytes:
        """The bytes of rows ``first`` ... ``until`` - 1; fewer if the file is shorter."""
        self.file.seek(self.start + first * self.row)
        return self.file.read((until - first) * self.row)

    def flush(self) -> None:
        """Bring what was appended to disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def seal(self, rows: int) -> None:
        """Write the header, which says ``rows``."""
        if self.start:
            self.file.seek(0)
            np.lib.format.write_array_header_1_0(
                self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, *self.shape)}
            )
            assert self.file.tell() == HEADER
        self.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
