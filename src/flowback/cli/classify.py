"""``flowback classify``: classify images with the flow's own likelihood, without a trained classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from flowback.checked import to_dict
from flowback.classification import Method
from flowback.cli.console import say, show_table
from flowback.cli.options import Processes, held_out, out_folder, parse
from flowback.config import DataConfig
from flowback.data.image_set import ImageSet
from flowback.errors import InputError
from flowback.evaluation.held_out import Accuracy, topk_accuracy
from flowback.evaluation.plots import plot_confusion
from flowback.evaluation.report import make_record, weights_of
from flowback.files import write_json
from flowback.model import Flow

__all__ = ["Options", "run"]

FEW_CLASSES = 20
"""Up to so many classes the exhaustive rule, one pass for each class, is run unasked."""


@dataclass(frozen=True)
class Options:
    """Classify labelled images and count: top-1, top-5, each class, confusion matrix.

    Under `torchrun` or `accelerate launch` the processes share the images.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images; those of the checkpoint unless given. `--data NAME` or `--data FOLDER` for short."""
    split: Literal["test", "train"] = "test"
    """Part of the data."""
    method: Literal["auto", "gradient", "exhaustive", "both"] = "auto"
    """The rule: one forward and one backward pass, or a pass for every class; auto: both up to 20 classes."""
    noise: bool = True
    """Add the noise of training to the images; the flow never saw images without."""
    draws: int = 1
    """Draws of the noise to average over."""
    steps: int = 1
    """Steps of gradient ascent on the class logits; 1 is Algorithm 1 of the paper."""
    step_size: float = 1.0
    """Of each step, in logits per nat."""
    seed: int = 0
    """Seed of the noise."""
    limit: int | None = None
    """Classify only so many images, spread evenly over the set."""
    batch_size: int = 64
    """Images at once."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    out: Path | None = None
    """Folder of the record and the pictures; by default `evaluation` in the checkpoint's folder."""
    json: Path | None = None
    """Also write the record to this file."""

    def check(self) -> None:
        """Raise InputError for numbers out of range; not on construction, whose errors tyro frames."""
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("--batch-size and --limit must be at least 1.")


def run(argv: list[str]) -> None:
    """Classify, show, write."""
    options = parse(Options, argv, "classify")
    options.check()
    processes = Processes(options.device)
    flow = Flow.from_pretrained(options.checkpoint, processes.device)
    if not flow.config.num_classes:
        raise InputError(f"{options.checkpoint} is an unconditional model: it has no classes to tell apart.")
    images = held_out(options.data, flow.config, options.split)
    found = [
        processes.merged(
            topk_accuracy(
                flow, images, method, options.limit, options.batch_size, options.noise, options.draws,
                options.seed, options.steps, options.step_size, processes.share, progress=True,
            )
        )
        for method in _methods(options, flow.config.num_classes)
    ]  # fmt: skip
    if processes.is_main:
        _write(found, images, options, flow.device)
    processes.close()


def _write(found: list[Accuracy], images: ImageSet, options: Options, device: torch.device) -> None:
    """Files, pictures, tables, warnings."""
    settings = {
        **weights_of(options.checkpoint),
        "data": to_dict(options.data),
        "images": images.name,
        "images_hash": images.fingerprint,
        "count": found[0].images,
        **{
            name: getattr(options, name)
            for name in ("noise", "draws", "steps", "step_size", "seed", "batch_size")
        },
    }
    warnings = [
        f"{result.nonfinite} images have {result.method} scores that are not finite; they count as wrong."
        for result in found
        if result.nonfinite
    ]
    figures: dict[str, Any] = {result.method: _figures(result, images.classes) for result in found}
    record = make_record("classify", figures, settings, warnings, device)
    folder = out_folder(options.out, options.checkpoint)
    for result in found:
        title = f"{images.name}, {result.method} rule: {result.top1:.1%} of {result.images}"
        plot_confusion(result.confusion, images.classes, title, folder / f"confusion-{result.method}.png")
    for path in (folder / "classify.json", options.json):
        if path is not None:
            write_json(path, record)
    _show(found, images.name, images.classes)
    for warning in warnings:
        say(f"Warning: {warning}")
    say(f"Record and confusion matrices: {folder}")


def _methods(options: Options, classes: int) -> list[Method]:
    if options.method == "gradient" or (options.method == "auto" and classes > FEW_CLASSES):
        return ["gradient"]
    return ["exhaustive"] if options.method == "exhaustive" else ["gradient", "exhaustive"]


def _figures(result: Accuracy, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        **{name: getattr(result, name) for name in ("top1", "top5", "nonfinite", "seconds")},
        "images_per_second": result.images_per_second,
        "per_class": dict(zip(classes, result.per_class.tolist(), strict=True)),
        "confusion": result.confusion.tolist(),
    }


def _show(found: list[Accuracy], name: str, classes: tuple[str, ...]) -> None:
    rows = [
        [result.method, result.images, 100 * result.top1, 100 * result.top5, result.images_per_second]
        for result in found
    ]
    show_table(name, ["rule", "images", "top-1 (%)", "top-5 (%)", "images/s"], rows)
    shares = [100 * result.per_class for result in found]
    counts = found[0].confusion.sum(dim=1)
    order = sorted(range(len(classes)), key=lambda k: float(shares[0][k]))[:FEW_CLASSES]
    title = (
        "By class" if len(classes) <= FEW_CLASSES else f"The {FEW_CLASSES} hardest of {len(classes)} classes"
    )
    if len(classes) <= FEW_CLASSES:
        order = list(range(len(classes)))
    columns = ["class", "images", *(f"{result.method} (%)" for result in found)]
    show_table(title, columns, [[classes[k], int(counts[k]), *(float(s[k]) for s in shares)] for k in order])
