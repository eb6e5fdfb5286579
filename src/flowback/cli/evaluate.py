"""``flowback evaluate``: quality and likelihood of a checkpoint, or quality of images that exist already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from flowback import checkpoint as checkpoints
from flowback.alignment.encoders import create_encoder
from flowback.checked import to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import (
    Precision,
    Processes,
    Sampler,
    choose,
    held_out,
    is_checkpoint,
    out_folder,
    parse,
)
from flowback.config import DataConfig
from flowback.data.image_set import ImageSet, evenly, in_batches
from flowback.data.pixels import Faults, quantise
from flowback.data.vae import Codec, open_codec
from flowback.errors import InputError
from flowback.evaluation.held_out import likelihood, topk_accuracy
from flowback.evaluation.inception import load_inception
from flowback.evaluation.judge import Judge, guidance_scales
from flowback.evaluation.plots import plot_guidance
from flowback.evaluation.protocol import COMPARABLE
from flowback.evaluation.references import Reference, load_reference, open_images
from flowback.evaluation.report import make_record, weights_of
from flowback.files import write_json
from flowback.model import Flow
from flowback.progress import bar, track
from flowback.sampling import BlockPlan, Guidance, sample
from flowback.sampling.denoise import denoises

__all__ = ["Options", "run"]

FEW_CLASSES = 20
"""Up to so many classes the exhaustive rule of classification is run too."""

LOWER_IS_BETTER = ("fid", "fid_tarflow", "fd_efficientnet_lite0")
"""Figures that choose the guidance scale; the first that there is."""


@dataclass(frozen=True)
class Options:
    """Evaluate a checkpoint: likelihood and classification of held-out images, and quality of samples.

    Under `torchrun` or `accelerate launch` the processes share the work.
    In place of a checkpoint, a folder of images or an .npz of ADM's form: quality alone, against --reference.
    """

    subject: tyro.conf.Positional[Path]
    """A checkpoint folder, a run's folder (its newest checkpoint), or images."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data; those of the checkpoint unless given. `--data NAME` or `--data FOLDER` for short."""
    samples: int = 1024
    """Samples drawn, over all classes in turn; 0 for none."""
    guidance: str = "0"
    """Guidance scale, or FIRST:LAST:STEP to search: samples are drawn once for each, from the same noise."""
    ramp: bool = False
    """Let the guidance scale grow over the tokens of each block."""
    denoise: bool = True
    """End sampling with one denoising step."""
    sampler: Sampler = "sequential"
    """`auto`: the plan of `flowback plan` where it fits, else sequential; `jacobi`: windows in all blocks."""
    tolerance: float = 1e-3
    """Largest difference from the sequential images that `auto` may make; for `jacobi`, the last sweep's."""
    window: int = 16
    """Tokens in a window of `--sampler jacobi`."""
    precision: Precision = "fp32"
    """Of weights and caches while decoding."""
    reference: Path | None = None
    """What samples are compared with: ADM's .npz or a folder; by default the data's training images."""
    protocol: Literal["none", "adm", "tarflow"] = "none"
    """Figures in Inception features: ADM's (FID, sFID, IS, precision, recall), TARFlow's FID, or none."""
    inception_weights: Path | None = None
    """Local file of the Inception weights, in place of a download."""
    likelihood: bool = True
    """Measure nll and bits/dim of the test images."""
    classification: bool = True
    """Measure the accuracy of training-free classification of the test images."""
    draws: int = 3
    """Draws of the noise in likelihoods."""
    limit: int | None = None
    """Use only so many test images for likelihood and classification."""
    seed: int = 0
    """Seed of the first sample and of the noise on the first test image."""
    batch_size: int = 64
    """Images at once."""
    vae: str | None = None
    """Folder or hub name of the VAE, in place of the one that the checkpoint names; for latents only."""
    force_vae: bool = False
    """Decode with a VAE of other weights than those of training."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    out: Path | None = None
    """Folder of the record and the pictures; by default `evaluation` in the checkpoint's folder."""
    json: Path | None = None
    """Also write the record to this file."""

    def check(self) -> None:
        """Raise InputError for numbers out of range; not on construction, whose errors tyro frames."""
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1) or self.draws < 1:
            raise InputError("--batch-size, --limit and --draws must be at least 1.")
        if self.samples < 0 or self.samples == 1:
            raise InputError("--samples must be 0, or at least 2: a covariance needs two.")
        if self.window < 1 or not self.tolerance > 0:
            raise InputError("--window must be at least 1, and --tolerance above 0 (1e-3, say).")


def run(argv: list[str]) -> None:
    """Evaluate, show, write."""
    options = parse(Options, argv, "evaluate")
    options.check()
    processes = Processes(options.device)
    record = (
        _checkpoint(options, processes) if is_checkpoint(options.subject) else _images(options, processes)
    )
    if processes.is_main:
        _write(record, options)
    processes.close()


def _write(record: dict[str, Any], options: Options) -> None:
    """Files, tables, warnings."""
    folder = out_folder(options.out, options.subject)
    for path in (folder / "evaluate.json", options.json):
        if path is not None:
            write_json(path, record)
    _show(record, str(options.subject))
    searched = record["figures"].get("guidance", [])
    if len(searched) > 1:
        _show_search(searched, record["figures"]["best_guidance"], folder)
    for warning in record["warnings"]:
        say(f"Warning: {warning}")
    say(f"Record: {options.json or folder / 'evaluate.json'}")


def _checkpoint(options: Options, processes: Processes) -> dict[str, Any]:
    flow = Flow.from_pretrained(options.subject, processes.device)
    codec = open_codec(
        checkpoints.load_config(options.subject).codec, flow.device, options.vae, options.force_vae
    )
    scales = guidance_scales(options.guidance)
    if any(scales) and not flow.config.num_classes:
        raise InputError("--guidance needs classes, and this model is unconditional; leave it out.")
    figures: dict[str, Any] = {}
    settings: dict[str, Any] = {
        **weights_of(options.subject),
        "data": to_dict(options.data),
        "seed": options.seed,
    }
    warnings: list[str] = []
    judge = None
    if options.samples:  # first, so that a missing reference or network is known at once
        judge = _judge(options, processes, _reference(options, flow))
    if options.likelihood or options.classification:
        images = held_out(options.data, flow.config, "test")
        settings["held_out"] = {
            "images": images.name,
            "images_hash": images.fingerprint,
            "limit": options.limit,
            "draws": options.draws,
            "labels": "each image's own" if flow.config.num_classes and images.labels is not None else None,
        }
        figures |= _held_out_figures(options, flow, images, processes)
    if judge is not None:
        found, samplers = [], []
        numbers = evenly(options.samples, share=processes.share)
        for scale in scales:
            faults = Faults()
            plans, notice = _plans(options, flow, scale)
            drawn = _draw(options, flow, codec, scale, plans, numbers, faults)
            start = int(numbers[0]) if len(numbers) else 0
            samples = processes.merged(judge.gather(drawn, options.samples, start))
            found.append({"guidance": scale, **judge.figures(samples)})
            note = f"At guidance {scale:g}, " if len(scales) > 1 else ""
            sentences = processes.merged(faults).sentences()
            warnings += [note + sentence for sentence in [*([notice] if notice else []), *sentences]]
            samplers.append("sequential" if plans is None else [asdict(plan) for plan in plans])
        best = _best(found)
        figures |= {name: value for name, value in best.items() if name != "guidance"}
        figures |= {"guidance": found, "best_guidance": best["guidance"]} if len(found) > 1 else {}
        settings |= _sampling_settings(options, flow, scales, samplers) | _judge_settings(options, judge)
        warnings += judge.warnings(options.samples)
    return make_record("evaluate", figures, settings, warnings, flow.device)


def _images(options: Options, processes: Processes) -> dict[str, Any]:
    """Quality of images that exist already."""
    images = open_images(options.subject)
    if options.reference is None:
        raise InputError(f"{options.subject} holds images; give what to compare them with as --reference.")
    first = images.read(torch.tensor([0]))
    reference = load_reference(options.reference, first.shape[-1], first.shape[1])
    judge = _judge(options, processes, reference)
    numbers = evenly(len(images), share=processes.share)
    parts = in_batches(numbers, options.batch_size)
    drawn = (images.read(index) for index in track(parts, len(parts), "features", "batches"))
    start = int(numbers[0]) if len(numbers) else 0
    figures: dict[str, Any] = dict(judge.figures(processes.merged(judge.gather(drawn, len(images), start))))
    settings = {
        "samples": len(images),
        "samples_from": str(options.subject),
        "samples_hash": images.fingerprint,
        **_judge_settings(options, judge),
    }
    return make_record("evaluate", figures, settings, judge.warnings(len(images)), judge.encoder.mean.device)


def _held_out_figures(options: Options, flow: Flow, images: ImageSet, processes: Processes) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if options.likelihood:
        part = likelihood(
            flow, images, options.draws, options.seed, limit=options.limit, batch_size=options.batch_size,
            share=processes.share, progress=True,
        )  # fmt: skip
        found = processes.merged(part)
        estimates = {"nll": found.nll, "bits_per_dim": found.bits_per_dim}
        if images.in_pixels is not images:
            del estimates["bits_per_dim"]  # of 8-bit pixels, which latents are not
        for name, estimate in estimates.items():
            figures[name] = estimate.mean
            figures[f"{name}_error"], figures[f"{name}_draw_error"] = estimate.error, estimate.draw_error
    if options.classification and flow.config.num_classes and images.labels is not None:
        for method in ("gradient", "exhaustive") if flow.config.num_classes <= FEW_CLASSES else ("gradient",):
            accuracy = processes.merged(
                topk_accuracy(
                    flow, images, method, options.limit, options.batch_size, seed=options.seed,
                    share=processes.share, progress=True,
                )
            )  # fmt: skip
            figures[f"top1_{method}"], figures[f"top5_{method}"] = accuracy.top1, accuracy.top5
    return figures


def _reference(options: Options, flow: Flow) -> Reference:
    config = flow.config
    if options.reference is not None:
        codec = checkpoints.load_config(options.subject).codec
        size, channels = (config.image_size, config.channels) if codec.vae is None else (codec.image_size, 3)
        return load_reference(options.reference, size, channels)
    images = held_out(options.data, config, "train").in_pixels
    return Reference(images.name, images.fingerprint, images)


def _judge(options: Options, processes: Processes, reference: Reference) -> Judge:
    with processes.main_first():  # one downloads and computes the reference, the others find it
        inception = None
        if options.protocol != "none":
            inception = load_inception(options.inception_weights, processes.device)
        encoder = create_encoder("efficientnet_lite0").to(processes.device)
        return Judge(reference, encoder, options.protocol, inception, options.batch_size)


def _plans(options: Options, flow: Flow, scale: float) -> tuple[tuple[BlockPlan, ...] | None, str | None]:
    return choose(
        flow,
        options.subject,
        options.sampler,
        options.tolerance,
        options.window,
        options.batch_size,
        options.precision,
        scale,
    )


def _draw(
    options: Options,
    flow: Flow,
    codec: Codec,
    scale: float,
    plans: tuple[BlockPlan, ...] | None,
    numbers: Tensor,
    faults: Faults,
) -> Iterator[Tensor]:
    """Samples in batches: sample i has seed ``--seed`` + i and class i modulo their number."""
    classes = flow.config.num_classes or 0
    with bar() as progress:
        task = progress.add_task(f"sampling, guidance {scale:g}", total=len(numbers), note="")
        for index in in_batches(numbers, options.batch_size):
            labels = (index % classes).tolist() if classes else None
            seeds = (options.seed + index).tolist()
            images = sample(
                flow,
                labels,
                seeds,
                Guidance(scale, options.ramp),
                options.denoise,
                batch_size=options.batch_size,
                precision=options.precision,
                plans=plans,
            )
            names = [f"seed {seed}" for seed in seeds]
            yield quantise(
                codec.decode(images),
                names,
                faults,
                "truncate" if options.protocol == "tarflow" else "nearest",
            ).cpu()
            progress.advance(task, len(index))


def _sampling_settings(
    options: Options, flow: Flow, scales: list[float], samplers: list[Any]
) -> dict[str, Any]:
    exact = all(sampler == "sequential" for sampler in samplers)
    return {
        "samples": options.samples,
        "guidance": scales if len(scales) > 1 else scales[0],
        "ramp": options.ramp,
        "sampler": samplers if len(scales) > 1 else samplers[0],
        "tolerance": 0 if exact else options.tolerance,
        "precision": options.precision,
        "denoise": options.denoise and denoises(flow),
    }


def _judge_settings(options: Options, judge: Judge) -> dict[str, Any]:
    inception, reference = judge.inception, judge.reference
    return {
        "protocol": options.protocol,
        "rounding": "truncate" if options.protocol == "tarflow" else "nearest",
        "reference": reference.name,
        "reference_hash": reference.fingerprint,
        "reference_images": len(reference.images) if reference.images is not None else None,
        "reference_statistics_included": reference.pool is not None,
        "resize": "references: shorter side to the samples' size, then centre crop; networks: their own",
        "encoder_hash": judge.encoder.fingerprint,
        "inception_hash": inception.fingerprint if inception is not None else None,
    }


def _best(found: list[dict[str, float]]) -> dict[str, float]:
    name = next((name for name in LOWER_IS_BETTER if name in found[0]), None)
    return min(found, key=lambda row: row[name]) if name else found[0]


def _show(record: dict[str, Any], title: str) -> None:
    figures, samples = record["figures"], record["settings"].get("samples", 0)
    rows = []
    for name, value in figures.items():
        if isinstance(value, float) and not name.endswith("_error"):
            few = "fid" in name and samples < COMPARABLE
            rows.append(
                [name, value, figures.get(f"{name}_error"), f"from {samples:,} samples only" if few else ""]
            )
    show_table(title, ["figure", "value", "standard error", ""], rows)


def _show_search(found: list[dict[str, float]], best: float, folder: Path) -> None:
    names = [name for name in found[0] if name != "guidance"]
    show_table(
        "Guidance", ["guidance", *names], [[row["guidance"], *(row[n] for n in names)] for row in found]
    )
    scales = [row["guidance"] for row in found]
    plot_guidance(scales, {n: [row[n] for row in found] for n in names}, best, folder / "guidance.png")
    chosen = next(name for name in LOWER_IS_BETTER if name in names)
    say(f"Best guidance by {chosen}: {best:g}   (plot: {folder / 'guidance.png'})")
    if best in (scales[0], scales[-1]):
        say("It lies at the edge of the search: widen the range.")
