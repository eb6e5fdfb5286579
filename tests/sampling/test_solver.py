"""The steps down the noise levels, in float64 against densities whose scores are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from flowback import InputError
from flowback.sampling.solver import check_levels, evaluations, solve, spaced_levels

WEIGHTS, CENTRES, SPREADS = torch.tensor(
    [[0.3, 0.5, 0.2], [-0.6, 0.1, 0.8], [0.15, 0.1, 0.2]], dtype=torch.float64
)
"""A mixture of three Gaussians on the line."""


def noised(t: float) -> Normal:
    """Its parts with noise of the level t."""
    return Normal(CENTRES, (SPREADS**2 + t**2).sqrt())


def score(x: Tensor, t: float) -> Tensor:
    """Of the mixture: Σ w·N(x)·(μ − x)/s² over Σ w·N(x)."""
    parts = noised(t)
    shares = (WEIGHTS.log() + parts.log_prob(x[:, None])).softmax(1)
    return (shares * (CENTRES - x[:, None]) / parts.variance).sum(1)


def mean(x: Tensor, t: float) -> Tensor:
    return x + t**2 * score(x, t)


def flowed(x: Tensor, t: float, after: float) -> Tensor:
    """Where the probability flow takes x: on the line it keeps quantiles, found here by bisection."""
    share = lambda x, t: (WEIGHTS * noised(t).cdf(x[:, None])).sum(1)  # noqa: E731
    target, low, high = share(x, t), torch.full_like(x, -9), torch.full_like(x, 9)
    for _ in range(60):
        middle = (low + high) / 2
        below = share(middle, after) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


X = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64)


@pytest.mark.parametrize("spacing", ["linear", "log", "edm"])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order, spacing):
    """Twice the steps: 2^order times smaller errors at the last level, to a tenth, and errors that vanish."""
    exact, errors = flowed(X, 0.5, 0.05), []
    for intervals in (64, 128):
        states = list(solve(mean, X, spaced_levels(0.5, 0.05, intervals + 1, spacing), method))
        assert len(states) == intervals + 1
        errors.append((states[-2] - exact).abs().max())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] < (0.01 if method == "euler" else 1e-4)


@pytest.mark.parametrize("method", ["euler", "heun", "stochastic"])
def test_one_level_is_tweedies_formula(method):
    (clean,) = solve(mean, X, (0.3,), method)
    assert torch.equal(clean, X + 0.3**2 * score(X, 0.3))


def test_the_last_step_is_tweedies_formula_at_the_last_level():
    before, clean = list(solve(mean, X, (0.3, 0.1), "heun"))
    assert torch.equal(clean, mean(before, 0.1))


def test_steps_by_hand():
    """One step from 0.4 to 0.1 by the formulas of the module."""
    clean, levels = mean(X, 0.4), (0.4, 0.1)
    v = (X - clean) / 0.4
    euler = X - 0.3 * v
    found = [next(solve(mean, X, levels, method, lambda step: X * step)) for method in ("euler", "heun")]
    heun = X - 0.3 * (v + (euler - mean(euler, 0.1)) / 0.1) / 2
    alpha = (0.1 / 0.4) ** 2
    stochastic = clean + 0.1 * (alpha**0.5 * v + (1 - alpha) ** 0.5 * X)
    found.append(next(solve(mean, X, levels, "stochastic", lambda step: X * step)))
    for state, expected in zip(found, (euler, heun, stochastic), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


def test_stochastic_steps_keep_the_density():
    """Noisy draws of one point stay draws at each level: mean and spread, 5 errors of 20,000 draws."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda step: torch.randn(20_000, dtype=torch.float64, generator=generator)  # noqa: E731
    levels = (0.5, 0.4, 0.2, 0.05)
    states = list(
        solve(lambda x, t: torch.full_like(x, 0.7), 0.7 + 0.5 * draw(0), levels, "stochastic", draw)
    )
    for state, level in zip(states, levels[1:], strict=False):
        assert state.mean().item() == pytest.approx(0.7, abs=5 * level / 20_000**0.5)
        assert state.std().item() == pytest.approx(level, rel=5 / 40_000**0.5)
    assert (states[-1] == 0.7).all()


@pytest.mark.parametrize("method", ["euler", "heun", "stochastic"])
def test_asks_for_the_mean_as_often_as_it_says(method):
    asked = []
    counting = lambda x, t: asked.append(t) or mean(x, t)  # noqa: E731
    list(solve(counting, X, (0.4, 0.2, 0.1), method, lambda step: X))
    assert len(asked) == evaluations(3, method)
    assert set(asked) == {0.4, 0.2, 0.1}


def test_spacings():
    assert spaced_levels(0.5, 0.1, 5) == pytest.approx((0.5, 0.4, 0.3, 0.2, 0.1))
    assert spaced_levels(0.8, 0.1, 4, "log") == pytest.approx((0.8, 0.4, 0.2, 0.1))
    roots = [level ** (1 / 7) for level in spaced_levels(0.5, 0.01, 5, "edm")]
    steps = [after - level for level, after in itertools.pairwise(roots)]
    assert steps == pytest.approx([steps[0]] * 4)
    for spacing in ("linear", "log", "edm"):
        levels = spaced_levels(0.3, 0.07, 9, spacing)
        assert (levels[0], levels[-1], len(levels)) == (0.3, 0.07, 9)
        assert spaced_levels(0.3, 0.07, 1, spacing) == (0.3,)
    assert spaced_levels(0.3, 0.07, 2, "log") == (0.3, 0.07)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spaced_levels(0.1, 0.3, 4), "0.1, 0.3 do not decrease"),
        (lambda: spaced_levels(0.3, 0.3, 2), "0.3, 0.3 do not decrease"),
        (lambda: spaced_levels(0.3, 0.0, 2), "above 0"),
        (lambda: spaced_levels(0.3, 0.1, 0), "at least 1"),
        (lambda: check_levels(()), "no noise levels"),
        (lambda: next(solve(mean, X, (0.3, 0.1, 0.2))), "0.3, 0.1, 0.2 do not decrease"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
