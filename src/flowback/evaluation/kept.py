"""Statistics of references, kept on disk: a pass over ImageNet is made once."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowback.cache import cache_folder
from flowback.record import replacing

__all__ = ["kept"]

_LAYOUT = 1
"""Goes into the key; raise it when what is kept changes."""


def kept(key: Sequence[str], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The arrays that were kept under ``key``, or those of ``make``, which are kept from now on.

    Args:
        key: all that the arrays depend on: hashes of images and weights, and the rule.
        make: computes the arrays.
    """
    name = hashlib.blake2b("\0".join((str(_LAYOUT), *key)).encode(), digest_size=16).hexdigest()
    path = cache_folder() / "statistics" / f"{name}.npz"
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {array: torch.from_numpy(file[array]) for array in file.files}
    except (OSError, ValueError, zipfile.BadZipFile):
        pass  # not there, or damaged: made anew
    made = make()
    with replacing(path, "wb") as file:
        arrays: dict[str, Any] = {array: tensor.numpy() for array, tensor in made.items()}
        np.savez(file, **arrays)
    return made
