"""``flowback sample``: draw images from a checkpoint into a folder; the same command resumes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate.utils import gather_object
from torch import Tensor

from flowback import checkpoint as checkpoints
from flowback.cli.console import say, show_table
from flowback.cli.options import Precision, Sampler, choose, parse
from flowback.data.vae import Codec, open_codec
from flowback.errors import InputError
from flowback.files import write_json
from flowback.model import Flow
from flowback.processes import Processes
from flowback.progress import bar
from flowback.provenance import environment
from flowback.sampling import BlockPlan, Guidance, sample, trajectory
from flowback.sampling.denoise import denoises
from flowback.sampling.image_files import Drawn, SampleFolder, read_png, save_grid, save_npz, save_trajectory
from flowback.sampling.sampler import check_guidance

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Draw images. Image i has seed SEED + i and label LABELS[i mod their number].

    The same command on the same folder draws the missing images only. Under `torchrun` or
    `accelerate launch` the processes share the work.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    out: Path
    """Folder of the images, one PNG each."""
    count: int = 16
    """Number of images, over all labels."""
    labels: tuple[int, ...] = ()
    """Classes to draw, in turn; none given: all classes in turn."""
    unconditional: bool = False
    """Draw without labels from a model with classes."""
    seed: int = 0
    """Seed of the first image."""
    guidance: float = 0.0
    """Guidance scale w of c + w·(c − u); 0 is off."""
    ramp: bool = False
    """Let w grow from 0 to its value over the tokens of each block."""
    formula: Literal["tarflow", "starflow"] = "tarflow"
    """How the predictions with and without label are joined."""
    attention_temperature: float = 1.0
    """Of the stream without label; other than 1 it guides unconditional models too."""
    guided_blocks: int | None = None
    """Guide this many blocks only, those nearest the noise."""
    denoise: bool = True
    """End with one denoising step."""
    batch_size: int = 64
    """Images drawn at once by a process."""
    sampler: Sampler = "sequential"
    """`auto`: the plan of `flowback plan` where it fits, else sequential; `jacobi`: windows in all blocks."""
    tolerance: float = 1e-3
    """Largest difference from the sequential images that `auto` may make; for `jacobi`, the last sweep's."""
    window: int = 16
    """Tokens in a window of `--sampler jacobi`."""
    precision: Precision = "fp32"
    """Of weights and caches while decoding."""
    redraws: int = 3
    """How often an image with non-finite values is drawn again."""
    grid: Path | None = None
    """Also write all images as one picture, classes in rows."""
    npz: Path | None = None
    """Also write all images as the file that ADM's evaluator reads."""
    trajectory: Path | None = None
    """Also write the picture of the way from noise to image, for the first 8 images."""
    vae: str | None = None
    """Folder or hub name of the VAE, in place of the one that the checkpoint names; for latents only."""
    force_vae: bool = False
    """Decode with a VAE of other weights than those of training."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    json: Path | None = None
    """Write settings, counts and images/s to this file."""


def run(argv: list[str]) -> None:
    """Draw, write, report."""
    options = parse(Options, argv, "sample")
    _check(options)
    processes = Processes(options.device)
    state = processes.state
    flow = Flow.from_pretrained(options.checkpoint, processes.device)
    codec = open_codec(
        checkpoints.load_config(options.checkpoint).codec, flow.device, options.vae, options.force_vae
    )
    labels = _labels(flow, options)
    guidance = Guidance(
        options.guidance, options.ramp, options.formula, options.attention_temperature, options.guided_blocks
    )
    check_guidance(flow, bool(labels), guidance)
    plans, notice = choose(
        flow,
        options.checkpoint,
        options.sampler,
        options.tolerance,
        options.window,
        options.batch_size,
        options.precision,
        options.guidance,
    )
    settings = _settings(options, labels, plans, codec)
    folder = SampleFolder(options.out, settings, options.count, options.batch_size)
    state.wait_for_everyone()  # all have looked at the folder before the first one changes it
    if state.is_main_process:
        folder.begin()
    state.wait_for_everyone()

    def draw(numbers: list[int], redraw: int) -> Tensor:
        drawn = sample(
            flow,
            [labels[n % len(labels)] for n in numbers] if labels else None,
            [options.seed + n for n in numbers],
            guidance,
            options.denoise,
            batch_size=options.batch_size,
            precision=options.precision,
            plans=plans,
            redraw=redraw,
        )
        return codec.decode(drawn)

    def notes(number: int) -> dict[str, object]:
        own = {"label": labels[number % len(labels)]} if labels else {}
        return {"seed": options.seed + number, **own}

    missing = folder.missing()
    state.wait_for_everyone()
    started, done = time.perf_counter(), []
    with bar() as progress:
        task = progress.add_task("sampling", total=-(-len(missing) // state.num_processes), note="")
        for drawn in folder.fill(
            draw, notes, missing, state.process_index, state.num_processes, options.redraws
        ):
            done.append(drawn)
            progress.advance(task, drawn.images)
    parts: list[Drawn] = gather_object(done) if state.num_processes > 1 else done
    seconds = time.perf_counter() - started
    if state.is_main_process:
        _extras(flow, codec, options, labels, guidance, plans, folder)
        if notice:
            say(notice)
        _report(flow, options, settings, parts, len(missing), seconds)
    # All leave together and close the group: a process that exits under its threads is aborted.
    state.wait_for_everyone()
    state.destroy_process_group()


def _check(options: Options) -> None:
    """Refuse options that no model can satisfy."""
    for name in ("count", "batch_size", "window"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1.")
    if not options.tolerance > 0:
        raise InputError(f"--tolerance {options.tolerance:g} must be above 0 (1e-3, say).")
    if options.redraws < 0:
        raise InputError("--redraws must not be negative.")
    if options.labels and options.unconditional:
        raise InputError("--labels and --unconditional exclude each other; give one of them.")
    if len(options.labels) > options.count:
        raise InputError(f"{len(options.labels)} labels for {options.count} images; raise --count.")


def _labels(flow: Flow, options: Options) -> list[int]:
    """Classes to draw in turn; none for unconditional."""
    if options.labels:
        flow.labels(list(options.labels), len(options.labels))
        return list(options.labels)
    return [] if options.unconditional else list(range(flow.config.num_classes or 0))


def _settings(
    options: Options, labels: Sequence[int], plans: tuple[BlockPlan, ...] | None, codec: Codec
) -> dict[str, Any]:
    """All that decides how an image looks."""
    keep = ("seed", "guidance", "ramp", "formula", "attention_temperature", "guided_blocks", "denoise")
    swept = any(plan.window > 1 for plan in plans or ())
    return {
        "checkpoint": str(checkpoints.resolve(options.checkpoint).resolve()),
        "labels": list(labels),
        **{name: getattr(options, name) for name in keep},
        "precision": options.precision,
        "plans": [asdict(plan) for plan in plans or ()] if swept else None,
        **({"vae": codec.config.weights} if codec.config.vae else {}),
    }


def _extras(
    flow: Flow,
    codec: Codec,
    options: Options,
    labels: Sequence[int],
    guidance: Guidance,
    plans: Sequence[BlockPlan] | None,
    folder: SampleFolder,
) -> None:
    """The grid, the .npz and the trajectory."""
    there = [n for n in range(options.count) if folder.file(n).is_file()]
    if (options.grid or options.npz) and there:
        pixels = {n: read_png(folder.file(n))[0] for n in there}
        if options.grid:
            columns = -(-options.count // len(labels)) if labels else max(1, round(len(there) ** 0.5))
            # Classes in rows; where one has fewer images than another, the rest of its row stays black.
            order = [n for k in range(len(labels)) for n in range(k, columns * len(labels), len(labels))]
            black = torch.zeros_like(pixels[there[0]])
            shown = [pixels.get(n, black) for n in order or there]
            save_grid(torch.stack(shown).float() / 127.5 - 1, options.grid, columns)
        if options.npz:
            own = [labels[n % len(labels)] for n in there] if labels else None
            save_npz(torch.stack([pixels[n] for n in there]), options.npz, own)
    if options.trajectory:
        numbers = range(min(8, options.count))
        own = [labels[n % len(labels)] for n in numbers] if labels else None
        seeds = [options.seed + n for n in numbers]
        states = trajectory(
            flow, own, seeds, guidance, options.denoise, precision=options.precision, plans=plans
        )
        save_trajectory([codec.decode(state) for state in states], options.trajectory)


def _report(
    flow: Flow,
    options: Options,
    settings: dict[str, Any],
    parts: Sequence[Drawn],
    missing: int,
    seconds: float,
) -> None:
    failed = sorted(number for part in parts for number in part.failed)
    drawn, redrawn = sum(part.images for part in parts), sum(part.redrawn for part in parts)
    if options.denoise and not denoises(flow):
        say("Not denoised: this model was trained without Gaussian noise.")
    if missing < options.count:
        say(f"{options.count - missing} images were there already.")
    if failed:
        shown = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
        say(
            f"{len(failed)} images stayed non-finite after {options.redraws} redraws "
            f"and were not written: {shown}."
        )
    rate = drawn / seconds
    rows = [["images drawn", drawn], ["redrawn (non-finite)", redrawn], ["failed", len(failed)]]
    show_table(str(options.out), ["", "value"], [*rows, ["seconds", seconds], ["images/s", rate]])
    if options.json:
        result = {"drawn": drawn, "present": options.count - missing, "redrawn": redrawn, "failed": failed}
        write_json(
            options.json,
            {
                "environment": environment(flow.device),
                "settings": {
                    **settings,
                    "count": options.count,
                    "batch_size": options.batch_size,
                },
                "result": {**result, "seconds": seconds, "images_per_second": rate},
            },
        )
