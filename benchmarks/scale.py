"""What a second process gains, and what a checkpoint costs.

    python benchmarks/scale.py --json scale.json

64×64 images, patch 4, 4 blocks of 4 layers, the training loop itself on images in memory. ``processes-P`` are
P gloo processes that share the threads, ``processes-1`` has them all; ``ratio`` is images/s over those of
``processes-1``. Runs take turns. ``save-WIDTH`` is a checkpoint with weights, one average and the optimiser's
state, flushed to the disk. Training waits only while its state is copied, not while it is written. For a run
that saves every five minutes, ``wait_share`` is the share of its time spent on the copy, and ``share`` on the
whole checkpoint. ``write`` is the time that the same bytes take as one plain file.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from flowback import ModelConfig, RunConfig, TrainConfig, checkpoint
from flowback.data.image_set import MemoryImages
from flowback.provenance import environment
from flowback.training import train_loop
from flowback.training.distributed import gathered
from flowback.training.objective import Objective
from harness import write_rows

CLASSES = 10
INTERVAL = 300
"""Seconds between two checkpoints."""


@dataclass(frozen=True)
class Options:
    """Time processes and checkpoints."""

    json: Path | None = None
    """The file to write."""
    width: int = 256
    """Width of the Transformer in the runs."""
    batch: int = 16
    """Images in a step, over all processes."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes; each has its share of the threads."""
    threads: int = 2
    """Threads in all."""
    steps: int = 4
    """Steps between two looks at the clock; three looks a run, of which the first is the warm-up."""
    rounds: int = 2
    """Runs of each kind."""
    save_widths: tuple[int, ...] = (256, 512)
    """Widths whose checkpoints are timed."""
    folder: Path = Path(tempfile.gettempdir())
    """On the disk that checkpoints go to."""
    worker: Path | None = None
    """Train into this folder, and stop; the script calls itself so."""


def run_config(width: int, options: Options) -> RunConfig:
    """The run that is timed."""
    model = ModelConfig(image_size=64, patch_size=4, width=width, blocks=4, layers=4, num_classes=CLASSES)
    steps = 3 * options.steps
    train_config = TrainConfig(
        steps=steps,
        batch_size=options.batch,
        log_every=options.steps,
        save_every=steps,
        eval_every=steps,
        device="cpu",
    )
    return RunConfig(model=model, train=train_config)


def work(out: Path, options: Options) -> None:
    """One process of a run."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (256, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (256,), generator=generator)
    images = MemoryImages("random", tuple(map(str, range(CLASSES))), labels, pixels)
    train_loop(run_config(options.width, options), images, out)


def rates(processes: int, options: Options) -> list[float]:
    """Images/s of one run, look by look, without the first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        arguments = ["--worker", f"{name}/run", "--width", str(options.width), "--batch", str(options.batch)]
        arguments += ["--steps", str(options.steps)]
        subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), __file__, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads // processes)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows = Path(name, "run", "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["images_per_second"] for row in rows[1:]]


def saving(width: int, options: Options) -> dict[str, Any]:
    """The row of one checkpoint's cost."""
    config = run_config(width, options)
    torch.manual_seed(0)
    objective = Objective(config)
    optimiser = torch.optim.AdamW(objective.parameters(), fused=True)
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    state = {"objective": objective.state_dict(), "optimizer": optimiser.state_dict(), "step": 1}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        waits, seconds, writes, size = [], [], [], 0
        for turn in range(3):
            started = time.perf_counter()
            weights, held = gathered([objective.flow.state_dict(), state], device=torch.device("cpu"))
            waits.append(time.perf_counter() - started)
            checkpoint.save(folder / str(turn), config, weights, held)
            seconds.append(time.perf_counter() - started)
            size = sum(file.stat().st_size for file in (folder / str(turn)).iterdir())
            shutil.rmtree(folder / str(turn))
            content = bytes(size)
            started = time.perf_counter()
            with (folder / "plain").open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            writes.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "name": f"save-{width}",
        "bytes": size,
        "seconds": median,
        "slowest": max(seconds),
        "write": statistics.median(writes),
        "share": median / INTERVAL,
        "wait": statistics.median(waits),
        "wait_share": statistics.median(waits) / INTERVAL,
    }


def main() -> None:
    """Time, print and write."""
    options = tyro.cli(Options, prog="scale.py")
    if options.worker:
        work(options.worker, options)
        return
    device, console = torch.device("cpu"), Console()
    torch.set_num_threads(options.threads)
    console.print(f"{environment(device)['device']}; width {options.width}, batch {options.batch}")
    found: dict[int, list[float]] = {count: [] for count in options.processes}
    for _ in range(options.rounds):
        for count, values in found.items():
            values += rates(count, options)
    rows: list[dict[str, Any]] = []
    for count, values in found.items():
        rate = statistics.median(values)
        rows.append({"name": f"processes-{count}", "images_per_second": rate, "all": values})
        if 1 in found:
            rows[-1]["ratio"] = rate / statistics.median(found[1])
    rows += [saving(width, options) for width in options.save_widths]
    table = Table("row", "images/s", "ratio", "MB", "seconds", "write", "share of 5 min", "waits", "share")
    for row in rows:
        if "bytes" in row:
            cells = [f"{row['bytes'] / 1e6:.0f}", f"{row['seconds']:.2f}", f"{row['write']:.2f}"]
            cells += [f"{row['share']:.2%}", f"{row['wait']:.3f}", f"{row['wait_share']:.2%}"]
            table.add_row(row["name"], "", "", *cells)
        else:
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            table.add_row(row["name"], f"{row['images_per_second']:.2f}", ratio, *6 * [""])
    console.print(table)
    if options.json:
        settings = {"width": options.width, "batch": options.batch, "threads": options.threads}
        write_rows(options.json, device, rows, settings=settings)


if __name__ == "__main__":
    main()
