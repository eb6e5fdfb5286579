"""How the blocks are inverted: what ``--sampler`` and the options beside it come to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flowback import checkpoint as checkpoints
from flowback.flow import Flow
from flowback.sampling import BlockPlan
from flowback.sampling.plan import load_plan, plan_file, wanted

__all__ = ["Precision", "Sampler", "choose"]

Sampler = Literal["auto", "sequential", "jacobi"]
Precision = Literal["fp32", "bf16"]


def choose(
    flow: Flow,
    checkpoint: Path,
    sampler: Sampler,
    tolerance: float,
    window: int,
    batch_size: int,
    precision: Precision,
    guidance: float,
) -> tuple[tuple[BlockPlan, ...] | None, str | None]:
    """A plan for each block, None for sequential, and what to tell the user about it.

    ``auto`` takes the checkpoint's plan where it was measured for such sampling on this device.
    """
    if sampler == "jacobi":
        every = BlockPlan(min(window, flow.config.tokens), "z", tolerance)
        return (every,) * flow.config.blocks, None
    if sampler == "sequential":
        return None, None
    folder = checkpoints.resolve(checkpoint)
    if not plan_file(folder).is_file():
        return None, f"Sequential: {checkpoint} has no plan; `flowback plan` makes one."
    plan = load_plan(plan_file(folder))
    misfit = plan.misfit(wanted(folder, flow, batch_size, precision, guidance, tolerance))
    if misfit:
        return None, f"Sequential: the plan does not fit, {misfit}; `flowback plan` makes one that does."
    swept = sum(block.window > 1 for block in plan.blocks)
    return plan.blocks, f"Planned: {swept} of {len(plan.blocks)} blocks by Jacobi sweeps."
