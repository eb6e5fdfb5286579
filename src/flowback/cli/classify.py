"""``flowback classify``: classify images with the flow's own likelihood, without a trained classifier."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from flowback.checked import to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import out_folder, parse
from flowback.config import DataConfig
from flowback.errors import InputError

if TYPE_CHECKING:
    from flowback.classification import Method
    from flowback.data.image_set import ImageSet
    from flowback.evaluation.held_out import Accuracy
    from flowback.model import Flow
    from flowback.processes import Processes

__all__ = ["Options", "run"]

SHOWN = 20
"""Predictions in the table; the files have all."""

MANY_CLASSES = 20
"""With more classes than this, only the hardest are shown."""


@dataclass(frozen=True)
class Options:
    """Classify labelled images, and show top-1, top-5, accuracy per class and the confusion matrix.

    With --images, say of each picture of your own what it is.

    Under `torchrun` or `accelerate launch` the processes share the images.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images; by default those of the checkpoint. Short forms: `--data NAME`, `--data FOLDER`."""
    images: Path | None = None
    """A picture, or a folder of pictures, with labels or without: write what the flow says of each to
    predictions.csv and predictions.json, and measure nothing."""
    split: Literal["test", "train"] = "test"
    """Which images of the data set."""
    method: Literal["auto", "gradient", "normalised", "exhaustive", "both"] = "auto"
    """The rule. `gradient` (the paper's) and `normalised` take one forward and one backward pass,
    `exhaustive` takes a pass for every class. `both`: gradient and exhaustive. `auto`: all of them,
    exhaustive up to 20 classes."""
    noise: bool = True
    """Add the training noise to the images; the flow never saw clean ones."""
    draws: int = 1
    """Draws of the noise to average over."""
    steps: int = 1
    """Steps of gradient ascent on the class logits; 1 is Algorithm 1 of the paper."""
    step_size: float = 1.0
    """Size of each step, in logits per nat."""
    seed: int = 0
    """Seed of the noise."""
    limit: int | None = None
    """Classify only this many images, spread evenly over the set."""
    batch_size: int = 64
    """Images per batch."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    out: Path | None = None
    """Folder of the report and the pictures; by default `evaluation` in the checkpoint's folder."""
    json: Path | None = None
    """Also write the report to this file."""

    def check(self) -> None:
        """Raise InputError for numbers out of range; not on construction, whose errors tyro frames."""
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("--batch-size and --limit must be at least 1.")
        if self.draws < 1 or self.steps < 1:
            raise InputError("--draws and --steps must be at least 1.")
        if not 0 < self.step_size < math.inf:
            raise InputError(f"--step-size {self.step_size} must be finite and above 0.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} is out of range; it goes from 0 to {2**32 - 1}.")


def run(argv: list[str]) -> None:
    """Classify, show, write."""
    options = parse(Options, argv, "classify")
    options.check()
    from flowback.evaluation.held_out import accuracy, matched, run_images
    from flowback.model import Flow
    from flowback.processes import Processes

    folder = out_folder(options.out, options.checkpoint)
    processes = Processes(options.device)
    flow = Flow.from_pretrained(options.checkpoint, processes.device)
    if options.images is not None:
        _predict(options, options.images, flow, processes, folder)
        return
    if not flow.config.num_classes:
        raise InputError(f"{options.checkpoint} is an unconditional model: it has no classes to tell apart.")
    images = matched(flow, run_images(flow, options.split, options.data))
    results = [
        processes.merged(
            accuracy(
                flow, images, method, noise=options.noise, draws=options.draws, steps=options.steps,
                step_size=options.step_size, limit=options.limit, seed=options.seed,
                batch_size=options.batch_size, share=processes.share, progress=True,
            )
        )
        for method in _methods(options, flow)
    ]  # fmt: skip
    if processes.is_main:
        _write(results, images, options, flow, folder)
    processes.close()


def _predict(options: Options, path: Path, flow: Flow, processes: Processes, folder: Path) -> None:
    """Say of each picture what it is."""
    from flowback.evaluation.predictions import Prediction, Predictions, open_pictures, predict
    from flowback.evaluation.report import weights_of

    if options.method == "both":
        raise InputError("--images takes one rule; give --method gradient, normalised or exhaustive.")
    method: Method | None = None if options.method == "auto" else options.method
    images = open_pictures(flow, path, options.data.bad_images)
    found = processes.merged(
        Predictions(
            predict(
                flow, images, method, options.draws, limit=options.limit, seed=options.seed,
                batch_size=options.batch_size, share=processes.share, progress=True,
            )
        )
    )  # fmt: skip
    if processes.is_main:
        found.save(folder, {**weights_of(flow), "method": options.method, "seed": options.seed})
        rows = [list(astuple(each)) for each in found.rows[:SHOWN]]
        show_table(str(path), [field.name for field in fields(Prediction)], rows)
        more = len(found.rows) - SHOWN
        say(
            f"{more} more in {folder / 'predictions.csv'}"
            if more > 0
            else f"Written: {folder}/predictions.csv"
        )
    processes.close()


def _write(results: list[Accuracy], images: ImageSet, options: Options, flow: Flow, folder: Path) -> None:
    """Files, pictures, tables, warnings."""
    from flowback.evaluation.plots import plot_confusion
    from flowback.evaluation.report import Report, weights_of
    from flowback.provenance import environment

    names = ("noise", "draws", "steps", "step_size", "seed", "batch_size")
    settings = {
        **weights_of(flow),
        "data": to_dict(options.data),
        "images": images.name,
        "images_hash": images.fingerprint,
        "count": results[0].images,
        **{name: getattr(options, name) for name in names},
    }
    warnings = [
        f"{result.nonfinite} images have {result.method} scores that are not finite; they count as wrong."
        for result in results
        if result.nonfinite
    ]
    figures: dict[str, Any] = {result.method: _figures(result, images.classes) for result in results}
    report = Report("classify", figures, settings, tuple(warnings), environment(flow.device))
    for result in results:
        title = f"{images.name}, {result.method} rule: {result.top1:.1%} of {result.images}"
        plot_confusion(result.confusion, images.classes, title, folder / f"confusion-{result.method}.png")
    for path in (folder / "classify.json", options.json):
        if path is not None:
            report.save(path)
    _show(results, images.name, images.classes)
    for warning in warnings:
        say(f"Warning: {warning}")
    say(f"Report and confusion matrices: {folder}")


def _methods(options: Options, flow: Flow) -> tuple[Method, ...]:
    from flowback.evaluation.held_out import default_methods

    if options.method == "auto":
        return default_methods(flow)
    return ("gradient", "exhaustive") if options.method == "both" else (options.method,)


def _figures(result: Accuracy, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        **{name: getattr(result, name) for name in ("top1", "top5", "nonfinite", "seconds")},
        "images_per_second": result.images_per_second,
        "per_class": dict(zip(classes, result.per_class, strict=True)),
        "confusion": result.confusion.tolist(),
    }


def _show(results: list[Accuracy], name: str, classes: tuple[str, ...]) -> None:
    summary = [
        [result.method, result.images, 100 * result.top1, 100 * result.top5, result.images_per_second]
        for result in results
    ]
    show_table(name, ["rule", "images", "top-1 (%)", "top-5 (%)", "images/s"], summary)
    shares, counts = [result.per_class for result in results], results[0].confusion.sum(dim=1).tolist()
    order, title = list(range(len(classes))), "By class"
    if len(classes) > MANY_CLASSES:
        tried = [k for k in order if shares[0][k] is not None]
        order = sorted(tried, key=lambda k: shares[0][k] or 0.0)[:MANY_CLASSES]
        title = f"The {len(order)} hardest of {len(classes)} classes"
    rows = [[classes[k], counts[k], *(_percent(per_class[k]) for per_class in shares)] for k in order]
    show_table(title, ["class", "images", *(f"{result.method} (%)" for result in results)], rows)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
