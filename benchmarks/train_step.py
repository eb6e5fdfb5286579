"""Time and memory of one training step, against apple/ml-tarflow's on the same weights, images and labels.

    python benchmarks/train_step.py --reference PATH_TO_ML_TARFLOW --json train_step.json

64×64 images, patch 4, 4 blocks of 4 layers. A step is the loss, its gradient and AdamW; ours is the training
loop's objective with the fused optimiser, theirs the loss and optimiser of their train.py. Neither keeps an
average of the weights here. ``ratio`` is theirs over ours, ``memory_ratio`` ours over theirs (weights,
gradients, optimiser and activations, in a fresh process), ``to_peak`` the share of the speed of a large
matrix product of the same dtype and run; FLOPs are counted with causal attention, for both alike.
With ``--range`` there are rows of a flow with a range of noise levels (`ours-range-fp32`); ``range_ratio`` is
their time over the plain step's, the median over the turns (goal: at most 1.05).
Compiled rows (`ours-fp32-compiled`): ours the Transformers of the blocks, as ``--train.compile`` does, theirs
the whole model. Rows of the width 256 are named `ours-fp32`, others `ours-fp32-width512`.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowback import ModelConfig, RunConfig, TrainConfig
from flowback.flow.cost import flops_per_image
from flowback.flow.levels import levels_at
from flowback.provenance import environment
from flowback.tarflow_weights import to_tarflow
from flowback.training.objective import Objective
from flowback.training.state import set_up_bodies
from harness import interleave, peak_bytes, peak_in_fresh_process, write_rows

Precision = Literal["fp32", "bf16"]

CLASSES = 10
LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Options:
    """Time a training step."""

    json: Path | None = None
    """The file to write."""
    reference: Path | None = None
    """A checkout of apple/ml-tarflow to compare with."""
    widths: tuple[int, ...] = (256, 512)
    """Widths of the Transformer."""
    batch: int = 16
    """Images in a step."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    """Autocast dtypes."""
    range: bool = False
    """Time steps of a flow with a range of noise levels too."""
    compile: bool = False
    """Time compiled steps too; needs a C++ compiler and some minutes."""
    repeats: int = 5
    """Steps that are timed, after one that is not; the median is kept."""
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu` counts the process's own seconds, for a machine that others use, too."""
    device: str = "cpu"
    """Where all of it runs."""
    memory: bool = True
    """Measure the peak memory too, each row in a process of its own."""
    memory_of: str | None = None
    """Print the peak memory of one row, and stop; the script calls itself so."""


def model_config(width: int, ranged: bool = False) -> ModelConfig:
    """The shape that is timed, with one noise level or with a range of them."""
    config = ModelConfig(image_size=64, patch_size=4, width=width, blocks=4, layers=4, num_classes=CLASSES)
    return replace(config, noise="range", noise_min=0.01, noise_max=0.3) if ranged else config


def our_step(
    model: ModelConfig, precision: Precision, device: torch.device, compiled: bool
) -> Callable[..., Tensor]:
    """A step of flowback from fixed weights; returns the loss."""
    train = TrainConfig(precision=precision, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, compile=compiled)
    objective = _objective(model, train).to(device)
    set_up_bodies(objective.bodies, objective.config)
    optimiser = torch.optim.AdamW(
        objective.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimiser.zero_grad()
        levels = None
        if model.noise == "range":
            levels = levels_at(torch.rand(len(images)), model, train).to(device)
        loss = objective(images, labels, levels=levels).loss
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def their_step(
    width: int, precision: Precision, device: torch.device, compiled: bool, checkout: Path
) -> Callable[..., Tensor]:
    """The same of ml-tarflow."""
    file = checkout / "transformer_flow.py"
    if not file.is_file():
        sys.exit(f"--reference {checkout} has no transformer_flow.py; give a checkout of apple/ml-tarflow.")
    spec = importlib.util.spec_from_file_location("transformer_flow", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = model_config(width)
    model = module.Model(3, 64, 4, width, config.blocks, config.layers, num_classes=CLASSES)
    flow = _objective(config, TrainConfig()).flow
    model.load_state_dict(to_tarflow(config, flow.state_dict()))
    model.to(device)
    run = torch.compile(model) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimiser.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            z, _, log_dets = run(images, labels)
            loss = model.get_loss(z, log_dets)
        loss.backward()
        optimiser.step()
        return loss.detach() + 0.5 * math.log(2 * math.pi)  # the constant that they leave out

    return step


def _objective(model: ModelConfig, train: TrainConfig) -> Objective:
    torch.manual_seed(0)
    objective = Objective(RunConfig(model=model, train=train))
    for block in objective.flow.blocks:  # zero at the start of training, and then gradients stop there
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)
    return objective


def make(name: str, options: Options, device: torch.device) -> Callable[[], Tensor]:
    """The step of a row, with its batch."""
    width = int(name.split("-width")[1]) if "-width" in name else 256
    precision: Precision = "bf16" if "bf16" in name else "fp32"
    compiled = "compiled" in name
    if name.startswith("ours"):
        step = our_step(model_config(width, "-range-" in name), precision, device, compiled)
    else:
        assert options.reference is not None
        step = their_step(width, precision, device, compiled, options.reference)
    generator = torch.Generator().manual_seed(0)
    images = (2 * torch.rand(options.batch, 3, 64, 64, generator=generator) - 1).to(device)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator).to(device)
    return lambda: step(images, labels)


def matmul_peak(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of a product of two matrices of 2048 rows and columns."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    return (
        2 * 2048**3 / min(interleave({"product": lambda: a @ a}, device, repeats=5, clock=clock)["product"])
    )


def peak_of(name: str, options: Options) -> int:
    """Bytes of a row's first two steps and all that they need, in a fresh process."""
    arguments = ["--memory-of", name, "--batch", str(options.batch), "--device", options.device]
    if options.reference:
        arguments += ["--reference", str(options.reference)]
    return peak_in_fresh_process(arguments)


def print_memory(name: str, options: Options, device: torch.device) -> None:
    """Measure and print the peak memory of one row."""

    def two_steps() -> None:
        call = make(name, options, device)
        call()
        call()

    print(peak_bytes(two_steps, device))


def measure(
    options: Options, width: int, peaks: Mapping[Precision, float], device: torch.device
) -> list[dict[str, Any]]:
    """Rows of one width."""
    suffix = "" if width == 256 else f"-width{width}"
    kinds = [precision + ending for precision in options.precisions for ending in _endings(options)]
    more = {"ours-range": options.range, "ml-tarflow": options.reference is not None}
    codes = ["ours", *(code for code, wanted in more.items() if wanted)]
    names = [f"{code}-{kind}{suffix}" for kind in kinds for code in codes]
    calls = {name: make(name, options, device) for name in names}
    losses = {name: call().item() for name, call in calls.items()}
    clock = CLOCKS[options.clock]
    seconds = interleave(calls, device, options.repeats, clock=clock)
    flops = 3 * options.batch * flops_per_image(model_config(width))
    rows: list[dict[str, Any]] = []
    for name in names:
        median = statistics.median(seconds[name])
        precision: Precision = "bf16" if "bf16" in name else "fp32"
        rows.append(
            {
                "name": name,
                "width": width,
                "seconds": median,
                "fastest": min(seconds[name]),
                **({"peak_bytes": peak_of(name, options)} if options.memory else {}),
                "to_peak": flops / median / peaks[precision],
                "first_loss": losses[name],
            }
        )
        plain = name.replace("ml-tarflow", "ours").replace("-range", "")
        if "-range-" in name:
            turns = zip(seconds[name], seconds[plain], strict=True)
            rows[-1]["range_ratio"] = statistics.median(own / one for own, one in turns)
        if name.startswith("ml-tarflow"):
            ours, theirs = next(row for row in rows if row["name"] == plain), rows[-1]
            ours["ratio"] = theirs["seconds"] / ours["seconds"]
            if options.memory:
                ours["memory_ratio"] = ours["peak_bytes"] / theirs["peak_bytes"]
    return rows


def _endings(options: Options) -> tuple[str, ...]:
    return ("", "-compiled") if options.compile else ("",)


def main() -> None:
    """Time, print and write."""
    options = tyro.cli(Options, prog="train_step.py")
    device = torch.device(options.device)
    if options.memory_of:
        print_memory(options.memory_of, options, device)
        return
    console = Console()
    console.print(f"{environment(device)['device']}; batch {options.batch}, {options.clock} clock")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    clock = CLOCKS[options.clock]
    peaks = {precision: matmul_peak(device, dtypes[precision], clock) for precision in options.precisions}
    console.print("matrix product: " + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in peaks.items()))
    rows = [row for width in options.widths for row in measure(options, width, peaks, device)]
    table = Table("step", "seconds", "ratio", "range ratio", "peak MB", "memory ratio", "to peak")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['range_ratio']:.3f}" if "range_ratio" in row else "",
            f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
            f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
            f"{row['to_peak']:.2f}",
        )
    console.print(table)
    if options.json:
        write_rows(options.json, device, rows, matmul_flops_per_second=peaks, clock=options.clock)


if __name__ == "__main__":
    main()
