"""``flowback sample``: draw images from a checkpoint into a folder; run again, it resumes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from flowback.cli.console import say, show_table
from flowback.cli.options import default_folder, parse
from flowback.errors import InputError
from flowback.files import write_json
from flowback.task_config import FolderConfig, SampleConfig

if TYPE_CHECKING:
    from flowback.sample_folder import SampleReport

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Draw images. Image i has seed SEED + i and label LABELS[i mod their number].

    The same command on the same folder draws only the missing images. Under `torchrun` or
    `accelerate launch` the processes share the work.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, a run's folder (its newest checkpoint), a flow that comes with flowback
    (`fashion`), or a name on the Hub (`owner/name`, `owner/name@revision`)."""
    out: Path | None = None
    """Folder of the images, one PNG each; by default `samples/NAME`, with all in one picture beside it, or
    `samples/NAME-2` and so on where that holds images drawn with other options."""
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
    from flowback import checkpoint as checkpoints
    from flowback.data.vae import open_codec
    from flowback.model import Flow, load
    from flowback.processes import Processes
    from flowback.sample_folder import OtherImagesError, class_ids, draw_folder
    from flowback.sampling.block_plan import resolve_plan

    processes = Processes(options.device)
    checkpoint = checkpoints.resolve(checkpoints.fetch(options.checkpoint))
    model = load(checkpoint, processes.device)
    if processes.is_main:
        say(f"{options.checkpoint}: {model.about}")
    codec = open_codec(
        checkpoints.load_config(checkpoint).codec, model.device, options.vae, options.force_vae
    )
    plans, notice = None, None
    if isinstance(model, Flow):
        plans, notice = resolve_plan(model, options.sampling, checkpoint)
    if options.images.labels and processes.is_main:
        ids = dict.fromkeys(class_ids(model, options.images.labels))
        named = (f"{model.classes[k]} (id {k})" if model.classes else f"id {k}" for k in ids)
        say(f"Classes drawn: {', '.join(named)}")
    for out, images in _places(options):
        try:
            report = draw_folder(model, out, images, sampling=options.sampling, plans=plans, codec=codec)
            break
        except OtherImagesError:
            if options.out is not None:
                raise
    if processes.is_main:
        for sentence in (*([notice] if notice else []), *report.notices):
            say(sentence)
        _show(report)
        if images.grid:
            say(f"All in one picture: {images.grid}")
        if options.json:
            write_json(options.json, {**report.to_dict(), "checkpoint": str(checkpoint.resolve())})
    processes.close()
    if processes.is_main and report.problem:
        raise InputError(report.problem)


def _places(options: Options) -> Iterator[tuple[Path, FolderConfig]]:
    """Where the images may go, the best place first, and what else is written there."""
    if options.out is not None:
        yield options.out, options.images
        return
    first = default_folder("samples", options.checkpoint)
    for number in itertools.count(1):
        out = first if number == 1 else first.with_name(f"{first.name}-{number}")
        yield out, replace(options.images, grid=options.images.grid or out.with_name(f"{out.name}.png"))


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
