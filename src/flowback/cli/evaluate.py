"""``flowback evaluate``: quality and likelihood of a checkpoint, or quality of existing images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowback.cli.console import say, show_table
from flowback.cli.options import SEARCH, names_flow, out_folder, parse
from flowback.config import DataConfig
from flowback.errors import InputError
from flowback.task_config import EvaluateConfig, SampleConfig

if TYPE_CHECKING:
    from flowback.evaluation.report import Report
    from flowback.processes import Processes

__all__ = ["Measure", "Options", "run"]


@dataclass(frozen=True)
class Measure(EvaluateConfig):
    """What is measured, with the search as it is typed."""

    search: Annotated[tuple[float, ...], SEARCH] = ()
    """Guidance scales to try instead of one; samples are drawn for each, from the same noise."""


@dataclass(frozen=True)
class Options:
    """Evaluate a checkpoint: likelihood and classification of held-out images, and quality of samples.

    Under `torchrun` or `accelerate launch` the processes share the work.
    Instead of a checkpoint, give a folder of images or an .npz in ADM's format, to compare with --reference.
    """

    subject: tyro.conf.Positional[Path]
    """A checkpoint folder, a run's folder (its newest checkpoint), a name (`fashion`, `owner/name`), or
    images."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data; by default those of the checkpoint. Short forms: `--data NAME`, `--data FOLDER`."""
    measure: Annotated[Measure, tyro.conf.arg(name="")] = field(default_factory=Measure)
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    reference: Path | None = None
    """Images to compare samples with: ADM's .npz or a folder; by default the data's training images."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    out: Path | None = None
    """Folder of the report and the pictures; by default `evaluation` in the checkpoint's folder, or
    `evaluation/NAME` for a flow by name, and none for images."""
    json: Path | None = None
    """Also write the report to this file."""


def run(argv: list[str]) -> None:
    """Evaluate, show, write."""
    options = parse(Options, argv, "evaluate")
    from flowback.processes import Processes

    beside = options.out is not None or names_flow(options.subject)
    folder = out_folder(options.out, options.subject) if beside else None  # images: nothing unasked
    processes = Processes(options.device)
    report = _report(options, processes)
    if processes.is_main:
        files = [folder / "evaluate.json"] if folder is not None else []
        files += [options.json] if options.json is not None else []
        for path in files:
            report.save(path)
        _show(report, str(options.subject))
        if folder is not None and "best_guidance" in report.figures:
            _show_search(report, folder)
        for warning in report.warnings:
            say(f"Warning: {warning}")
        say(
            f"Report: {files[-1]}"
            if files
            else "No report is written: --json FILE or --out FOLDER writes one."
        )
    processes.close()


def _report(options: Options, processes: Processes) -> Report:
    import torch

    from flowback.evaluation.pipeline import evaluate, evaluate_images
    from flowback.evaluation.references import load_reference, open_images
    from flowback.model import load

    if names_flow(options.subject):
        return evaluate(
            load(options.subject, processes.device),
            options.data,
            reference=options.reference,
            config=options.measure,
            sampling=options.sampling,
            processes=processes,
            progress=True,
        )
    bad_images = options.data.bad_images
    images = open_images(options.subject, bad_images)
    if options.reference is None:
        raise InputError(
            f"{options.subject} holds images; give the images to compare them with as --reference."
        )
    _, channels, _, size = images.read(torch.tensor([0])).shape
    return evaluate_images(
        images,
        load_reference(options.reference, size, channels, bad_images),
        config=options.measure,
        batch_size=options.sampling.batch_size,
        processes=processes,
        progress=True,
    )


def _show(report: Report, title: str) -> None:
    from flowback.evaluation.protocol import COMPARABLE

    figures, samples = report.figures, report.settings.get("samples", 0)
    rows = []
    for name, value in figures.items():
        if isinstance(value, float) and not name.endswith("_error"):
            few = ("fid" in name or name.startswith("fd_")) and samples < COMPARABLE
            note = f"from {samples:,} samples only" if few else ""
            rows.append([name, value, figures.get(f"{name}_error"), note])
    show_table(title, ["figure", "value", "standard error", ""], rows)


def _show_search(report: Report, folder: Path) -> None:
    from flowback.evaluation.pipeline import deciding_figure
    from flowback.evaluation.plots import plot_guidance

    searched, best = report.figures["guidance"], report.figures["best_guidance"]
    names = [name for name in searched[0] if name != "guidance"]
    rows = [[row["guidance"], *(row[name] for name in names)] for row in searched]
    show_table("Guidance", ["guidance", *names], rows)
    values: dict[str, Sequence[float]] = {name: [row[name] for row in searched] for name in names}
    plot_guidance([row["guidance"] for row in searched], values, best, folder / "guidance.png")
    say(f"Best guidance by {deciding_figure(searched[0])}: {best:g}   (plot: {folder / 'guidance.png'})")
