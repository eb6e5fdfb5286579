"""A part of a data set that stands for all of it."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["evenly"]


def evenly(total: int, limit: int | None) -> Int64[Tensor, " n"]:
    """Indices of ``limit`` images spread evenly over ``total``; all if there are fewer.

    Example:
        >>> evenly(10, 4).tolist()
        [0, 2, 5, 7]
    """
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.arange(limit) * total // limit
