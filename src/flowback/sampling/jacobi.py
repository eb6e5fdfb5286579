"""Inversion of a block by windowed Jacobi sweeps: many tokens at once, several times.

The inverse solves x = b(x) + exp(a(x))·z, where token i of the right side depends on tokens before i only.
A sweep evaluates the right side for a window of tokens in parallel, from the values of the sweep before.
Windows are solved left to right, on the keys and values of what is solved (arXiv 2505.12849). After s
sweeps the first s tokens of a window are exact, so window-length sweeps always are, and a window of one
token is sequential decoding. Nothing is clamped.

Exact tokens leave the window: sweep s works on its last W − s + 1 tokens. An image that has converged
leaves the batch. Where a window stopped on the tolerance, its tokens' keys and values were computed from
values older by one sweep; they are computed anew with the next window's first sweep, never kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.errors import InputError
from flowback.flow import affine
from flowback.sampling.decoder import Decoder

__all__ = ["Init", "Solution", "first_guess", "jacobi", "solve_window"]

Init = Literal["z", "zeros"]
"""Values that the sweeps start from: the block's noise, or zeros."""


@dataclass(frozen=True)
class Solution:
    """Result of :func:`jacobi`."""

    x: Float[Tensor, "b n d"]
    sweeps: Float[Tensor, " b"]
    """Mean sweeps a window, for each image."""


def first_guess(z: Float[Tensor, "b n d"], init: Init | Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """What the sweeps start from; the first token is exact, as it passes the block unchanged."""
    if isinstance(init, Tensor):
        x = init.to(z, copy=True)
    else:
        x = z.clone() if init == "z" else torch.zeros_like(z)
    x[:, 0] = z[:, 0]
    _finite(x[:, 1:])
    return x


def _finite(guess: Tensor) -> None:
    """Zeros for what is not finite: a masked score of 0 times infinity would reach the tokens before it."""
    guess.nan_to_num_(0.0, 0.0, 0.0)


@torch.no_grad()
def jacobi(
    decoder: Decoder,
    z: Float[Tensor, "b n d"],
    window: int,
    tolerance: float | None = None,
    init: Init | Float[Tensor, "b n d"] = "z",
    sweeps: int | None = None,
) -> Solution:
    """x of z = f(x), window after window; both in the block's own order.

    Args:
        decoder: of the block, with room for 2·window tokens a step.
        z: the block's noise.
        window: tokens solved together.
        tolerance: an image is done with a window when no value changed by more in the last sweep; None
            sweeps to exactness.
        init: what the sweeps start from, by name or as values.
        sweeps: most sweeps a window, whatever the error; None sets no limit but exactness.

    Raises:
        InputError: a window, tolerance or number of sweeps out of range.
    """
    if window < 1 or (sweeps is not None and sweeps < 1):
        raise InputError("The Jacobi window and its number of sweeps must be at least 1.")
    if tolerance is not None and not tolerance > 0:
        raise InputError(f"The tolerance is {tolerance}; it must be above 0 (1e-3, say).")
    tokens = z.shape[1]
    x, stale = first_guess(z, init), 0
    total, windows = torch.zeros(len(z), dtype=torch.long), 0
    for start in range(1, tokens, window):
        end = min(start + window, tokens)
        done = solve_window(decoder, z, x, start, end, stale, tolerance, sweeps)
        total, windows = total + done, windows + 1
        # Sweep s made token start + s − 1 exact, but its key and value come with the sweep after.
        stale = min(start - 1 + int(done.min()), end - 1)
    return Solution(x, total / max(windows, 1))


@torch.no_grad()
def solve_window(
    decoder: Decoder,
    z: Float[Tensor, "b n d"],
    x: Float[Tensor, "b n d"],
    start: int,
    end: int,
    stale: int,
    tolerance: float | None,
    limit: int | None = None,
) -> Int[Tensor, " b"]:
    """Solve tokens start ... end − 1 in place, given those before; returns the sweeps that each image took.

    Args:
        decoder: of the block.
        z: the block's noise.
        x: solved before ``start``, first guesses from there on; ``start`` ... ``end`` − 1 are overwritten.
        start: first token, at least 1.
        end: one past the last token.
        stale: first token whose key and value are not of its present value; at most ``start`` − 1.
        tolerance: as for :func:`jacobi`.
        limit: most sweeps.
    """
    done = torch.zeros(len(z), dtype=torch.long)
    active = torch.arange(len(z))
    first = stale
    most = end - start if limit is None else min(limit, end - start)
    for sweep in range(1, most + 1):
        some = None if len(active) == len(z) else active
        values = x if some is None else x[some]
        noise = z[:, start:end] if some is None else z[some, start:end]
        known = max(start, first + 1)  # tokens before it are exact, or of an earlier window
        shift, log_scale = decoder.step(values[:, first : end - 1], first, some)
        skip = known - first - 1
        new = affine.inverse(noise[:, known - start :], shift[:, skip:], log_scale[:, skip:])
        change = (new - values[:, known:end]).abs().amax(dim=(1, 2))
        _finite(new[:, 1:])  # the first one is exact now, the others are guesses
        if some is None:
            x[:, known:end] = new
        else:
            x[some, known:end] = new
        done[active] = sweep
        first = start - 1 + sweep
        if tolerance is not None:
            # The one wait for the device in a sweep: images that leave make the sweeps that follow cheaper.
            # Not-a-number never compares as converged: such images run to the end, as sequential ones do.
            active = active[~(change <= tolerance).cpu()]
            if not len(active):
                break
    return done
