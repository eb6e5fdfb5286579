"""Iterative denoising as an initial value problem, for any mean x̂(x, t) of the clean image given x.

An image with Gaussian noise of the standard deviation t follows, as t falls, the probability flow

    dx/dt = −t·∇ log p_t(x) = (x − x̂)/t,    x̂(x, t) = x + t²·∇ log p_t(x)      (Tweedie's formula)

(Song et al., arXiv 2011.13456, Eq. 13; Karras et al., arXiv 2206.00364, Eq. 1). :func:`solve` goes down a row
of levels t₁ > t₂ > … > tₙ and ends at x̂(x, tₙ), as a step to the level 0 does: n levels are n steps, and one
level is one application of Tweedie's formula.

    euler       x + (t' − t)·v,    v = (x − x̂)/t
    heun        x + (t' − t)·(v + v')/2, v' at Euler's result and t' (there, Alg. 1); the last step is Euler's
    stochastic  x̂ + t'·(√α·v + √(1 − α)·ξ),    α = (t'/t)²: a draw of x at t' given x, as if x̂ were the image
                (iTARFlow, arXiv 2604.20041)

Here t' is the level after t, and ξ is standard normal noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.checked import require, require_one_of

__all__ = ["Mean", "Method", "Spacing", "check_levels", "evaluations", "solve", "spaced_levels"]

Method = Literal["euler", "heun", "stochastic"]

Spacing = Literal["linear", "log", "edm"]

Mean = Callable[[Tensor, float], Tensor]
"""x̂(x, t)."""

_RHO = 7
"""EDM's exponent (arXiv 2206.00364, Eq. 5): levels are evenly spaced in their 7th roots."""


def spaced_levels(first: float, last: float, steps: int, spacing: Spacing = "linear") -> tuple[float, ...]:
    """Levels from ``first`` down to ``last``, both exact; a single one is ``first``.

    Args:
        first: the largest.
        last: the smallest, above 0.
        steps: how many.
        spacing: evenly spaced themselves, in their logarithms, or as EDM's (Eq. 5, ρ = 7).

    Raises:
        InputError: no steps, an unknown spacing, or levels that do not decrease.

    Example:
        >>> spaced_levels(0.8, 0.1, 4, "log")
        (0.8, 0.4, 0.2, 0.1)
    """
    require_one_of(spacing, Spacing, "spacing of noise levels")
    require(steps >= 1, f"--denoise-steps is {steps}; it must be at least 1.")
    if steps == 1:
        return check_levels((first,))
    check_levels((first, last))
    shares = [step / (steps - 1) for step in range(1, steps - 1)]
    if spacing == "log":
        between = [first * (last / first) ** share for share in shares]
    else:
        root = _RHO if spacing == "edm" else 1
        low, high = last ** (1 / root), first ** (1 / root)
        between = [(high + share * (low - high)) ** root for share in shares]
    return check_levels((first, *between, last))


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """The levels, if they are positive and decrease.

    Raises:
        InputError: they do not.
    """
    shown = ", ".join(f"{level:g}" for level in levels)
    require(len(levels) > 0, "There are no noise levels to denoise at; give at least one.")
    require(all(0 < level < math.inf for level in levels), f"Noise levels are above 0: {shown}.")
    falls = all(after < level for level, after in itertools.pairwise(levels))
    require(falls, f"The noise levels {shown} do not decrease; give the largest one first.")
    return tuple(levels)


def evaluations(steps: int, method: Method) -> int:
    """How often :func:`solve` asks for x̂."""
    return 2 * steps - 1 if method == "heun" else steps


def solve(
    mean: Mean,
    x: Float[Tensor, "b ..."],
    levels: Sequence[float],
    method: Method = "euler",
    draw: Callable[[int], Tensor] | None = None,
) -> Iterator[Float[Tensor, "b ..."]]:
    """The state after each step: x at the levels after the first one, and last the clean image.

    Args:
        mean: x̂(x, t).
        x: noisy images at the first level.
        levels: decreasing standard deviations of the noise.
        method: how a step is made.
        draw: standard normal noise in the shape of x, given the number of the step, from 1; ``stochastic``
            needs it.

    Raises:
        InputError: levels that do not decrease, or an unknown method.

    Example:
        >>> import torch
        >>> point = torch.tensor([0.5])  # all images are this one, so that x̂ is known
        >>> [state.item() for state in solve(lambda x, t: point, torch.tensor([1.5]), (1.0, 0.25))]
        [0.75, 0.5]
    """
    require_one_of(method, Method, "method of denoising")
    levels = check_levels(levels)
    for step, (t, after) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True), start=1):
        clean = mean(x, t)
        if after == 0:
            x = clean
        elif method == "stochastic":
            assert draw is not None, "stochastic steps need noise"
            kept = (after / t) ** 2
            x = torch.lerp(clean, x, kept) + after * math.sqrt(1 - kept) * draw(step)
        else:
            ahead = torch.lerp(clean, x, after / t)
            if method == "heun":
                slope = (x - clean) / t + (ahead - mean(ahead, after)) / after
                ahead = x + (after - t) / 2 * slope
            x = ahead
        yield x
