"""How to sample one checkpoint fastest on one device, measured once and kept beside the checkpoint.

For every block a plan says: sequential, or windowed Jacobi with this window and first guess. Sequential
decoding is the reference for time and error. Candidates are measured on some windows of a batch of real
noise, the promising ones on whole blocks, and the chosen plan on the whole flow: where its images differ
from the sequential ones by more than the promised error, the sweeps' tolerance is tightened.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.checked import from_dict
from flowback.errors import InputError
from flowback.files import write_json
from flowback.flow import TARFlow
from flowback.provenance import environment
from flowback.sampling.decoder import Decoder, Precision
from flowback.sampling.jacobi import Init, first_guess, solve_window
from flowback.sampling.sampler import Batch, BlockPlan, new_tokens, solve

__all__ = ["Measured", "Plan", "device_name", "load_plan", "make_plan", "plan_file", "save_plan", "wanted"]

WINDOWS = (4, 8, 16, 32, 64)


INITS: tuple[Init, ...] = ("z", "zeros")


_PROBES = 3
"""Windows of a block that a candidate is first measured on."""


_GAIN = 0.95
"""A candidate must take less than this share of the sequential time."""


@dataclass(frozen=True)
class Measured:
    """One way to invert a block, as it was measured."""

    block: int
    window: int
    init: Init
    seconds: float
    """Of the whole block; of a candidate measured on some windows, extrapolated."""
    sweeps: float
    """Mean sweeps a window."""
    seconds_per_sweep: float
    errors: tuple[float, ...]
    """Largest error against the exact tokens after each sweep, over the windows measured."""


@dataclass(frozen=True)
class Plan:
    """The blocks' plans, and what they hold for."""

    checkpoint: str
    """SHA-256 of the weights."""
    device: str
    batch_size: int
    precision: Precision
    guidance: float
    tolerance: float
    """Promised largest difference from the sequential images, on the [-1, 1] scale, before denoising."""
    error: float
    """Difference that was measured."""
    sequential_seconds: float
    seconds: float
    blocks: tuple[BlockPlan, ...]
    """From block 1, at the data, to block T."""

    def misfit(self, asked: Plan) -> str | None:
        """Why this plan does not hold for the sampling that ``asked`` describes; None if it does."""
        if self.checkpoint != asked.checkpoint:
            return "it was made for another checkpoint"
        for name in ("device", "batch_size", "precision", "guidance"):
            own, wanted = getattr(self, name), getattr(asked, name)
            if own != wanted:
                return f"it was made for {name.replace('_', ' ')} {own}, not {wanted}"
        if self.tolerance > asked.tolerance:
            return f"it promises an error of {self.tolerance:g}, and {asked.tolerance:g} is asked for"
        return None


def device_name(device: torch.device) -> str:
    """Name of the device and, on the CPU, the number of threads: a plan is for these only."""
    return str(environment(device)["device"])


def make_plan(
    batch: Batch, z: Float[Tensor, "b n d"], asked: Plan, repeats: int = 2
) -> tuple[Plan, list[Measured]]:
    """Measure, choose, verify.

    Args:
        batch: labels and guidance that the plan is for.
        z: noise of the batch.
        asked: what the plan is to hold for, from :func:`wanted`.
        repeats: how often a whole block is timed; the fastest counts.
    """
    flow, tolerance = batch.engine.flow, asked.tolerance
    measured, plans, exact, base = [], {}, [z], 0.0
    for index in range(flow.config.blocks, 0, -1):
        block = _Block(batch, index, exact[-1])
        seconds, x = block.timed(BlockPlan(), repeats)
        base += seconds
        exact.append(block.module.reorder(x))
        measured.append(Measured(index, 1, "z", seconds, 1.0, seconds / max(z.shape[1] - 1, 1), (0.0,)))
        candidates = list(_candidates(block, x, tolerance, seconds))
        measured += candidates
        plans[index] = BlockPlan(tolerance=tolerance)
        best = seconds * _GAIN
        for found in sorted(candidates, key=lambda m: m.seconds)[:2]:
            plan = BlockPlan(found.window, found.init, tolerance)
            if found.seconds < best and (took := block.timed(plan, repeats)[0]) < best:
                plans[index], best = plan, took
    chosen, error, seconds = _verified(batch, plans, exact, tolerance)
    made = replace(
        asked,
        error=error,
        sequential_seconds=base,
        seconds=base if all(plan.window == 1 for plan in chosen) else seconds,
        blocks=chosen,
    )
    return made, sorted(measured, key=lambda m: (m.block, m.window, m.init))


def wanted(
    checkpoint: Path, flow: TARFlow, batch_size: int, precision: Precision, guidance: float, tolerance: float
) -> Plan:
    """A plan without blocks, for comparison: what some sampling needs a plan to hold for.

    Args:
        checkpoint: the checkpoint's folder.
        flow: its flow, on the device that samples.
        batch_size: images decoded at once.
        precision: of weights and caches.
        guidance: its scale.
        tolerance: promised error.

    Raises:
        InputError: a tolerance that is not above 0.
    """
    if not tolerance > 0:
        raise InputError(f"--tolerance {tolerance:g} must be above 0 (1e-3, say).")
    with (checkpoint / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    where = device_name(flow.device)
    return Plan(weights, where, batch_size, precision, guidance, tolerance, 0.0, 0.0, 0.0, ())


class _Block:
    """A block with the noise it is measured on, in its own order."""

    def __init__(self, batch: Batch, index: int, z: Tensor) -> None:
        self.batch, self.index = batch, index
        self.module = batch.engine.flow.blocks[index - 1]
        self.z = self.module.reorder(z)

    def timed(self, plan: BlockPlan, repeats: int) -> tuple[float, Tensor]:
        """Seconds of the fastest of some runs, and the result."""
        times = []
        for _ in range(repeats):
            decoder = self.batch.decoder(self.index, new_tokens(plan))
            started = time.perf_counter()
            x = solve(decoder, self.z, plan)
            _wait(x)
            times.append(time.perf_counter() - started)
        return min(times), x


def _candidates(
    block: _Block, exact: Tensor, tolerance: float, sequential_seconds: float
) -> Iterator[Measured]:
    """Every window and first guess, on some windows with the exact tokens before them."""
    z, tokens = block.z, block.z.shape[1]
    for window in (*(w for w in WINDOWS if w < tokens - 1), tokens - 1):
        starts = list(range(1, tokens, window))
        probes = sorted({starts[round(k * (len(starts) - 1) / (_PROBES - 1))] for k in range(_PROBES)})
        allowed = sequential_seconds * window / (tokens - 1)
        for init in INITS:
            # Filled with the exact tokens once; windows are then measured from the last to the first, so that
            # what a window writes lies behind those still to come.
            decoder = block.batch.decoder(block.index, max(tokens - 1, 2 * window))
            decoder.step(exact[:, :-1], 0)
            probed = []
            for start in reversed(probes):
                end = min(start + window, tokens)
                guess = torch.cat([exact[:, :start], first_guess(z, init)[:, start:]], 1)
                probed.append(_probe(decoder, z, guess, exact, start, end, tolerance, 2 * allowed))
            counts = [len(curve) for curve, _, _ in probed]
            worst = [max(c[min(k, len(c) - 1)] for c, _, _ in probed) for k in range(max(counts))]
            took = sum(seconds for _, seconds, _ in probed)
            share = sum(min(start + window, tokens) - start for start in probes) / (tokens - 1)
            whole = took / share if all(finished for _, _, finished in probed) else math.inf
            mean = sum(counts) / len(counts)
            yield Measured(block.index, window, init, whole, mean, took / sum(counts), tuple(worst))


def _probe(
    decoder: Decoder,
    z: Tensor,
    x: Tensor,
    exact: Tensor,
    start: int,
    end: int,
    tolerance: float,
    allowed: float,
) -> tuple[list[float], float, bool]:
    """Errors after each sweep of one window, seconds, and whether it converged in the ``allowed`` ones."""
    errors, took = [], 0.0
    for first in range(start, end):
        # One sweep at a time, the error read between them; exact tokens leave as in a run of all sweeps.
        before = x[:, first:end].clone()
        started = time.perf_counter()
        solve_window(decoder, z, x, first, end, first - 1, None, 1)
        _wait(x)
        took += time.perf_counter() - started
        errors.append(float((x[:, start:end] - exact[:, start:end]).abs().max()))
        if float((x[:, first:end] - before).abs().max()) <= tolerance:
            return errors, took, True
        if took > allowed:
            return errors, took, False
    return errors, took, True


def _verified(
    batch: Batch, plans: dict[int, BlockPlan], exact: list[Tensor], promised: float
) -> tuple[tuple[BlockPlan, ...], float, float]:
    """Plans whose images keep the promise, with their error and seconds."""
    for tightening in (1, 10, 100, 1000):
        made = {i: replace(plan, tolerance=promised / tightening) for i, plan in plans.items()}
        chosen = tuple(made[index] for index in sorted(made))
        started = time.perf_counter()
        x = list(batch.invert(exact[0], chosen))[-1]
        _wait(x)
        seconds = time.perf_counter() - started
        error = float((x - exact[-1]).abs().max())
        if error <= promised / 2:  # other noise may be harder
            return chosen, error, seconds
    return tuple(BlockPlan(tolerance=promised) for _ in plans), 0.0, 0.0


def plan_file(checkpoint: Path) -> Path:
    """Where the plan of a checkpoint lies: in its folder."""
    return checkpoint / "sampling-plan.json"


def save_plan(plan: Plan, measured: list[Measured], path: Path) -> None:
    """Write a plan with what it was chosen from."""
    record = {"environment": environment(), "plan": asdict(plan), "measured": [asdict(m) for m in measured]}
    write_json(path, record)


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: no plan, or damaged.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text())["plan"]
        blocks = tuple(from_dict(BlockPlan, block) for block in values.pop("blocks"))
        return Plan(**values, blocks=blocks)
    except FileNotFoundError:
        raise InputError(f"There is no plan at {path}; make one with `flowback plan`.") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; make the plan again with `flowback plan`.") from None


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
