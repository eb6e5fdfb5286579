"""``flowback plan``: measure how to sample a checkpoint fastest on this device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from flowback import checkpoint as checkpoints
from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.devices import pick_device
from flowback.errors import InputError
from flowback.files import write_json
from flowback.model import Flow
from flowback.provenance import environment
from flowback.sampling.block_plan import make_plan, plan_file, save_plan, wanted
from flowback.sampling.decoder import Engine
from flowback.sampling.guidance import Guidance
from flowback.sampling.sampler import Batch, noise

__all__ = ["Options", "run"]

_SEED = 2**31
"""First seed of the noise that is measured on: far from those that people sample with."""


@dataclass(frozen=True)
class Options:
    """Measure each block sequentially and by Jacobi sweeps; store the fastest way beside the checkpoint.

    `flowback sample --sampler auto` uses the plan where checkpoint, device, batch size, precision and
    guidance are those it was made for.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    batch_size: int = 64
    """Images decoded at once."""
    tolerance: float = 1e-3
    """Promised largest difference from the sequential images, on the [-1, 1] scale, before denoising."""
    guidance: float = 0.0
    """Guidance scale that will be sampled with."""
    ramp: bool = False
    """Let the guidance scale grow over the tokens of each block."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and caches."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    json: Path | None = None
    """Also write the plan and what was measured to this file."""


@torch.no_grad()
def run(argv: list[str]) -> None:
    """Measure, store, report."""
    options = parse(Options, argv, "plan")
    if options.batch_size < 1:
        raise InputError("--batch-size must be at least 1.")
    device = pick_device(options.device, "--device")
    folder = checkpoints.resolve(options.checkpoint)
    flow = Flow.from_pretrained(folder, device)
    asked = wanted(folder, flow, options.batch_size, options.precision, options.guidance, options.tolerance)
    classes = flow.config.num_classes or 0
    if options.guidance and not classes:
        raise InputError("--guidance needs classes, and this model is unconditional; leave it out.")
    guidance, engine = Guidance(options.guidance, options.ramp), Engine(flow, options.precision)
    count = engine.images_at_once(options.batch_size, guidance.active)
    labels = flow.labels([i % classes for i in range(count)], count) if classes else None
    z = noise(flow, range(_SEED, _SEED + count))
    batch = Batch(engine, labels, guidance, guidance.scales(count, z))
    plan, measured = make_plan(batch, z, asked)
    save_plan(plan, measured, plan_file(folder))
    rows = []
    for index, block in enumerate(plan.blocks, start=1):
        own = [m for m in measured if m.block == index]
        base = next(m.seconds for m in own if m.window == 1)
        best = min((m for m in own if m.window > 1), key=lambda m: m.seconds)
        way = "sequential" if block.window == 1 else f"window {block.window} from {block.init}"
        rows.append([index, way, base, best.seconds, best.window, best.sweeps])
    columns = ["block", "plan", "sequential s", "best Jacobi s", "its window", "its sweeps"]
    show_table(
        f"Plan for batches of {options.batch_size} on {plan.device}, {count} images decoded at once",
        columns,
        rows,
    )
    say(
        f"Sequential {plan.sequential_seconds:.3g} s, planned {plan.seconds:.3g} s, "
        f"largest difference {plan.error:.1e} (promised {plan.tolerance:g}). Written to {plan_file(folder)}."
    )
    if options.json:
        record = {"environment": environment(flow.device), "plan": asdict(plan)}
        write_json(options.json, {**record, "measured": [asdict(m) for m in measured]})
