"""``flowback classify``: classify images with the flow's own likelihood, without a trained classifier."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from flowback.checked import to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import LEVELS, out_folder, parse
from flowback.config import DataConfig
from flowback.errors import InputError

if TYPE_CHECKING:
    from flowback.classification import Method
    from flowback.data.image_set import ImageSet
    from flowback.evaluation.by_level import LevelChoice
    from flowback.evaluation.held_out import Accuracy, LoopOptions
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
    """A checkpoint folder, a run's folder (its newest checkpoint), or a name (`fashion`, `owner/name`)."""
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
    noise: Annotated[tuple[float, ...], LEVELS] = ()
    """Noise levels, such as 0.1,0.2,0.3, for a flow trained over a range of them. Of several, all are shown,
    and the one that classifies training images best is taken. By default the range's geometric middle."""
    no_noise: tyro.conf.FlagCreatePairsOff[bool] = False
    """Take the images without noise; the flow never saw clean ones."""
    choose_on: int = 2000
    """Training images, spread evenly over the set, that choose among several noise levels."""
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
    """Folder of the report and the pictures; by default `evaluation` in the checkpoint's folder, or
    `evaluation/NAME` for a flow by name."""
    json: Path | None = None
    """Also write the report to this file."""

    def check(self) -> None:
        """Raise InputError for numbers out of range; not on construction, whose errors tyro frames."""
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("--batch-size and --limit must be at least 1.")
        if self.choose_on < 1:
            raise InputError("--choose-on must be at least 1.")
        if self.noise and self.no_noise:
            raise InputError("--noise and --no-noise exclude each other; give one of them.")
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
    for level in options.noise:
        flow.levels(level, 1)
    images = matched(flow, run_images(flow, options.split, options.data))
    choices: list[LevelChoice] = []
    if len(options.noise) > 1:
        choices = _choices(options, flow, images, processes)
        results = [choice.accuracy for choice in choices]
    else:
        results = [
            processes.merged(
                accuracy(
                    flow, images, method, noise=not options.no_noise, draws=options.draws,
                    steps=options.steps, step_size=options.step_size, **_at_one_level(options, processes),
                )
            )
            for method in _methods(options, flow)
        ]  # fmt: skip
    if processes.is_main:
        _write(results, choices, images, options, flow, folder)
    processes.close()


def _loop(options: Options, processes: Processes) -> LoopOptions:
    """Which images, in which batches."""
    return {
        "limit": options.limit,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "share": processes.share,
        "progress": True,
    }


def _at_one_level(options: Options, processes: Processes) -> LoopOptions:
    """The same, at the level of --noise or the flow's own."""
    return {**_loop(options, processes), "level": options.noise[0] if options.noise else None}


def _choices(options: Options, flow: Flow, images: ImageSet, processes: Processes) -> list[LevelChoice]:
    """Of each rule, the accuracy at all levels, of training images and of those that are measured."""
    from flowback.evaluation.by_level import LevelChoice, accuracy_by_level
    from flowback.evaluation.held_out import matched, run_images

    training = matched(flow, run_images(flow, "train", options.data))
    loop = _loop(options, processes)
    some: LoopOptions = {**loop, "limit": options.choose_on}
    sets: list[tuple[ImageSet, LoopOptions]] = [(training, some), (images, loop)]
    choices = []
    for method in _methods(options, flow):
        at_levels = [
            processes.merged(
                accuracy_by_level(
                    flow, each, options.noise, method, draws=options.draws, steps=options.steps,
                    step_size=options.step_size, **own,
                )
            )
            for each, own in sets
        ]  # fmt: skip
        choices.append(LevelChoice(*at_levels))
    return choices


def _predict(options: Options, path: Path, flow: Flow, processes: Processes, folder: Path) -> None:
    """Say of each picture what it is."""
    from flowback.evaluation.predictions import Prediction, Predictions, open_pictures, predict
    from flowback.evaluation.report import weights_of

    if options.method == "both":
        raise InputError("--images takes one rule; give --method gradient, normalised or exhaustive.")
    if len(options.noise) > 1:
        raise InputError("--images takes one noise level; give --noise a single one, or leave it out.")
    method: Method | None = None if options.method == "auto" else options.method
    images = open_pictures(flow, path, options.data.bad_images)
    found = processes.merged(
        Predictions(predict(flow, images, method, options.draws, **_at_one_level(options, processes)))
    )
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


def _write(
    results: list[Accuracy],
    choices: list[LevelChoice],
    images: ImageSet,
    options: Options,
    flow: Flow,
    folder: Path,
) -> None:
    """Files, pictures, tables, warnings."""
    from flowback.evaluation.plots import plot_confusion
    from flowback.evaluation.report import Report, weights_of
    from flowback.provenance import environment

    names = ("draws", "steps", "step_size", "seed", "batch_size")
    settings = {
        **weights_of(flow),
        "data": to_dict(options.data),
        "images": images.name,
        "images_hash": images.fingerprint,
        "count": results[0].images,
        "noise": list(options.noise) or not options.no_noise,
        **{name: getattr(options, name) for name in names},
    }
    warnings = [
        f"{result.nonfinite} images have {result.method} scores that are not finite; they count as wrong."
        for result in results
        if result.nonfinite
    ]
    figures: dict[str, Any] = {result.method: _figures(result, images.classes) for result in results}
    for choice in choices:
        figures[choice.accuracy.method] |= choice.to_dict()
    report = Report("classify", figures, settings, tuple(warnings), environment(flow.device))
    for result in results:
        title = f"{images.name}, {result.method} rule: {result.top1:.1%} of {result.images}"
        plot_confusion(result.confusion, images.classes, title, folder / f"confusion-{result.method}.png")
    for path in (folder / "classify.json", options.json):
        if path is not None:
            report.save(path)
    if choices:
        _show_levels(choices, images.name)
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


def _show_levels(choices: list[LevelChoice], name: str) -> None:
    """Accuracy by level; only training images choose."""
    rows: list[list[Any]] = []
    for choice in choices:
        training, measured = choice.training, choice.measured
        for level, seen, own in zip(training.levels, training.at, measured.at, strict=True):
            mark = "chosen" if level == choice.level else ""
            rows.append([own.method, f"{level:g}", 100 * seen.top1, 100 * own.top1, mark])
        means = [100 * both.averaged.top1 for both in (training, measured)]
        rows.append([measured.averaged.method, "all, averaged", *means, ""])
    count = choices[0].training.averaged.images
    columns = ["rule", "noise level", f"{count:,} training images (%)", "top-1 (%)", ""]
    show_table(f"{name}, by noise level", columns, rows)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
