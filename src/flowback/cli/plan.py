"""``flowback plan``: measure how to sample a checkpoint fastest on this device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.files import check_file, write_json
from flowback.task_config import SampleConfig

if TYPE_CHECKING:
    from flowback.sampling.block_plan import Plan

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Measure each block sequentially and by Jacobi sweeps; store the fastest way beside the checkpoint.

    `flowback sample --sampler auto` uses the plan if checkpoint, device, batch size, precision and guidance
    are the same as here; `--sampler` and `--window` are ignored here.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, a run's folder (its newest checkpoint), or a flow that comes with flowback, whose
    plan is kept in the cache."""
    sampling: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    json: Path | None = None
    """Also write the plan and the measurements to this file."""


def run(argv: list[str]) -> None:
    """Measure, store, show."""
    options = parse(Options, argv, "plan")
    from flowback import checkpoint as checkpoints
    from flowback.devices import pick_device
    from flowback.model import Flow
    from flowback.provenance import environment
    from flowback.sampling.block_plan import plan_file, plan_record, plan_sampling, save_plan

    device = pick_device(options.device, "--device")
    folder = checkpoints.resolve(checkpoints.fetch(options.checkpoint))
    check_file(plan_file(folder), "The plan")
    flow = Flow.from_pretrained(folder, device)
    plan = plan_sampling(flow, options.sampling)
    save_plan(plan, plan_file(folder))
    _show(plan)
    say(f"Written to {plan_file(folder)}.")
    if options.json:
        write_json(options.json, {"environment": environment(flow.device), **plan_record(plan)})


def _show(plan: Plan) -> None:
    rows = []
    for index, block in enumerate(plan.blocks, start=1):
        measured = [m for m in plan.measured if m.block == index]
        base = next(m.seconds for m in measured if m.window == 1)
        best = min((m for m in measured if m.window > 1), key=lambda m: m.seconds)
        way = "sequential" if block.window == 1 else f"window {block.window} from {block.init}"
        rows.append([index, way, base, best.seconds, best.window, best.sweeps])
    columns = ["block", "plan", "sequential s", "best Jacobi s", "its window", "its sweeps"]
    show_table(f"Plan for batches of {plan.batch_size} on {plan.device}", columns, rows)
    say(
        f"Sequential {plan.sequential_seconds:.3g} s, planned {plan.seconds:.3g} s, "
        f"largest difference {plan.error:.1e} (promised {plan.tolerance:g})."
    )
