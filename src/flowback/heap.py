"""What the C library does with memory that was freed.

glibc gives the end of its heap back to the system whenever some MiB of it are free, and a step of training
or an encoder's pass asks for it again a moment later: each of its pages is mapped and cleared anew. Kept
instead, the same memory serves the next one; the peak is no higher.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os

__all__ = ["keep_freed"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_ON_HEAP = 32 << 20
"""Bytes; the most that glibc allows. Larger arrays are mapped and given back one by one."""
_KEPT = 1 << 30
"""Bytes that may be free at the heap's end."""


@functools.cache
def keep_freed() -> bool:
    """Keep up to 1 GiB of freed memory in this process from now on; whether the C library can.

    Whoever has set glibc's thresholds in the environment keeps them.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems have no such function
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and mallopt(_TRIM_THRESHOLD, _KEPT))
    return False
