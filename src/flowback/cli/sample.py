"""``flowback sample``: draw images from a checkpoint into a folder; run again, it resumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from flowback import checkpoint as checkpoints
from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.config import SampleConfig
from flowback.data.vae import open_codec
from flowback.errors import InputError
from flowback.files import write_json
from flowback.model import Flow, load
from flowback.processes import Processes
from flowback.sample_folder import FolderConfig, SampleReport, draw_folder
from flowback.sampling.block_plan import resolve_plan

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Draw images. Image i has seed SEED + i and label LABELS[i mod their number].

    The same command on the same folder draws only the missing images. Under `torchrun` or
    `accelerate launch` the processes share the work.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint); of a flow or a student."""
    out: Path
    """Folder of the images, one PNG each."""
    images: tyro.conf.OmitArgPrefixes[FolderConfig] = field(default_factory=FolderConfig)
    sampling: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)
    vae: str | None = None
    """Folder or hub name of the VAE, instead of the one named in the checkpoint; for latents only."""
    force_vae: bool = False
    """Decode even if the VAE's weights are not those of training."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    json: Path | None = None
    """Write settings, counts and images/s to this file."""


def run(argv: list[str]) -> None:
    """Draw and show."""
    options = parse(Options, argv, "sample")
    processes = Processes(options.device)
    checkpoint = checkpoints.resolve(checkpoints.fetch(options.checkpoint))
    model = load(checkpoint, processes.device)
    codec = open_codec(
        checkpoints.load_config(checkpoint).codec, model.device, options.vae, options.force_vae
    )
    plans, notice = None, None
    if isinstance(model, Flow):
        plans, notice = resolve_plan(model, options.sampling, checkpoint)
    report = draw_folder(
        model, options.out, options.images, sampling=options.sampling, plans=plans, codec=codec
    )
    if processes.is_main:
        for sentence in (*([notice] if notice else []), *report.notices):
            say(sentence)
        _show(report)
        if options.json:
            write_json(options.json, {**report.to_dict(), "checkpoint": str(checkpoint.resolve())})
    processes.close()
    if processes.is_main and report.problem:
        raise InputError(report.problem)


def _show(report: SampleReport) -> None:
    if report.present:
        say(f"{report.present} images were there already.")
    rows = [["images drawn", report.drawn], ["redrawn (non-finite)", report.redrawn]]
    rows += [["out of range", report.out_of_range], ["failed", len(report.failed)]]
    rows += [["seconds", report.seconds]]
    show_table(str(report.out), ["", "value"], [*rows, ["images/s", report.drawn / report.seconds]])
    if report.failed:
        places = [[failed.image, str(failed.overflow or "decoder")] for failed in report.failed]
        show_table("Images with non-finite values", ["image", "first in"], places)
