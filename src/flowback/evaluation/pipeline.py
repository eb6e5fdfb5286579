"""The whole evaluation of a flow, or of existing images: what ``flowback evaluate`` does."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from flowback.alignment.encoders import create_encoder
from flowback.checked import replaced, to_dict
from flowback.config import CodecConfig, DataConfig
from flowback.data.image_set import AnyImages, ImageSet, as_image_set, evenly, in_batches
from flowback.data.pixels import Faults, Rounding, quantise
from flowback.data.vae import Codec, open_codec
from flowback.evaluation.distilled import draw_pairs, under_teacher
from flowback.evaluation.held_out import (
    LoopOptions,
    accuracy,
    default_methods,
    held_out_batches,
    likelihood,
    matched,
    run_images,
)
from flowback.evaluation.inception import load_inception
from flowback.evaluation.judge import Judge
from flowback.evaluation.protocol import Protocol
from flowback.evaluation.references import BadImages, Reference, load_reference, open_images
from flowback.evaluation.report import Report, weights_of
from flowback.model import Flow, Student, load_teacher
from flowback.processes import Processes
from flowback.progress import track
from flowback.provenance import environment
from flowback.sampling import BlockPlan, Denoising, Guidance, Sampler
from flowback.sampling.block_plan import resolve_plan
from flowback.sampling.denoise import denoises
from flowback.sampling.sampler import drawing_level
from flowback.students.sampler import StudentSampler
from flowback.task_config import EvaluateConfig, SampleConfig

__all__ = ["deciding_figure", "evaluate", "evaluate_images", "reference_limit"]


def evaluate(
    flow: Flow | Student,
    images: AnyImages | DataConfig | None = None,
    *,
    reference: Reference | AnyImages | Path | str | None = None,
    config: EvaluateConfig | None = None,
    sampling: SampleConfig | None = None,
    plans: Sequence[BlockPlan] | None = None,
    processes: Processes | None = None,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Likelihood and classification of held-out images, and the quality of samples.

    A student has no likelihood: in its place, its images are compared with those of its teacher from the same
    noise, and the teacher says how likely they are, and whether it knows their classes
    (:mod:`flowback.evaluation.distilled`).

    Args:
        flow: the model, or a student.
        images: held-out images, or the data set whose test images they are; None: the data that the flow
            was trained on.
        reference: images to compare samples with: a set, a folder or an ``.npz`` in ADM's format; None: the
            training images of the data.
        config: what is measured.
        sampling: how samples are drawn; its batch size is used throughout.
        plans: how each block is inverted, from block 1; None: as ``sampling.sampler`` says.
        processes: share the work, and all get the report; None: this process does everything.
        progress: show bars.
        **options: fields of :class:`flowback.EvaluateConfig` and :class:`flowback.SampleConfig` that replace
            those of ``config`` and ``sampling``.

    Returns:
        The report. Its figures: nll in nats per dimension, bits per dimension, accuracies as shares, and
        distances of the samples; of a search, those of the best scale, and each scale's as ``guidance``.

    Raises:
        InputError: an unknown option, or images, reference or guidance that do not fit the model.

    Example:
        >>> import flowback
        >>> flow = flowback.create_flow("digits-mini", num_classes=10)
        >>> report = flowback.evaluate(flow, flowback.DataConfig("digits"), samples=0, limit=20, draws=1)
        >>> sorted(name for name in report.figures if "error" not in name)[:2]
        ['bits_per_dim', 'nll']
    """
    config, sampling = replaced((config or EvaluateConfig(), sampling or SampleConfig()), options)
    processes = processes or Processes(str(flow.device), alone=True)
    data = _Data(flow, images, reference)
    return _Evaluation(flow, data, config, sampling, plans, processes, progress).report()


def evaluate_images(
    images: AnyImages | Path | str,
    reference: Reference | AnyImages | Path | str,
    *,
    config: EvaluateConfig | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Quality of existing images.

    Args:
        images: a set, a folder of images of one size, or an ``.npz`` in ADM's format.
        reference: images to compare them with, in the same forms; a folder's are resized and cropped.
        config: protocol, Inception weights and limit of the reference; the rest is ignored.
        batch_size: images in one pass of a network.
        device: of the networks.
        processes: share the work, and all get the report; None: this process does everything.
        progress: show a bar.
        **options: fields of :class:`flowback.EvaluateConfig` that replace those of ``config``.

    Raises:
        InputError: an unknown option, no images, or a reference of another size.

    Example:
        >>> import flowback, torch
        >>> from flowback.data.image_set import MemoryImages
        >>> grey = MemoryImages("grey", (), None, torch.full((4, 1, 8, 8), 128, dtype=torch.uint8))
        >>> noise = MemoryImages("noise", (), None, torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8))
        >>> list(flowback.evaluate_images(grey, noise).figures)
        ['fd_efficientnet_lite0']
    """
    (config,) = replaced((config or EvaluateConfig(),), options)
    images = open_images(Path(images)) if isinstance(images, (str, Path)) else as_image_set(images)
    processes = processes or Processes(str(device), alone=True)
    _, channels, _, size = images.read(torch.tensor([0])).shape
    opened = _opened(reference, size, channels)
    judge = _judge(opened, config, len(images), batch_size, processes, progress)
    numbers = evenly(len(images), share=processes.share)
    parts = in_batches(numbers, batch_size)
    shown = track(parts, len(parts), "features", "batches") if progress else parts
    drawn = (images.read(index) for index in shown)
    samples = processes.merged(judge.gather(drawn, len(images), _start(numbers)))
    settings = {
        "samples": len(images),
        "samples_from": images.name,
        "samples_hash": images.fingerprint,
        **_judge_settings(judge, config, len(images)),
    }
    warnings = tuple(judge.warnings(len(images)))
    return Report("evaluate", judge.figures(samples), settings, warnings, environment(processes.device))


class _Data:
    """The images of an evaluation, read when they are needed."""

    def __init__(self, flow: Flow | Student, images: Any, reference: Any) -> None:
        self.flow, self._reference = flow, reference
        self._images = None if isinstance(images, DataConfig) else images
        run = flow.run.data if flow.run is not None else None
        self.config = images if isinstance(images, DataConfig) else run
        """The data set, where one is named."""
        self.codec = flow.run.codec if flow.run is not None else CodecConfig()

    @functools.cached_property
    def held_out(self) -> ImageSet:
        """The test images."""
        return (
            run_images(self.flow, "test", self.config) if self._images is None else as_image_set(self._images)
        )

    @functools.cached_property
    def reference(self) -> Reference:
        """What samples are compared with."""
        if self._reference is None:
            return Reference.of(run_images(self.flow, "train", self.config))
        model, latent = self.flow.config, self.codec.vae is not None
        size, channels = (self.codec.image_size, 3) if latent else (model.image_size, model.channels)
        bad_images = self.config.bad_images if self.config is not None else "refuse"
        return _opened(self._reference, size, channels, bad_images)


def _opened(
    reference: Reference | AnyImages | Path | str, size: int, channels: int, bad_images: BadImages = "refuse"
) -> Reference:
    if isinstance(reference, Reference):
        return reference
    if isinstance(reference, (str, Path)):
        return load_reference(Path(reference), size, channels, bad_images)
    return Reference.of(as_image_set(reference))


class _Part(NamedTuple):
    """A part of a report."""

    figures: dict[str, Any]
    settings: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class _Evaluation:
    """Everything that the parts of an evaluation need."""

    flow: Flow | Student
    data: _Data
    config: EvaluateConfig
    sampling: SampleConfig
    plans: Sequence[BlockPlan] | None
    processes: Processes
    progress: bool

    def report(self) -> Report:
        """Check, measure, put together."""
        images = judge = codec = teacher = None  # all are made first: what is missing is known at once
        if isinstance(self.flow, Flow):
            self.flow.levels(self._level, 1)
            drawing_level(self.flow, self.sampling.noise)
        elif self.config.likelihood:
            teacher = load_teacher(self.flow.student, self.flow.device, self.sampling.teacher)
        if self.config.likelihood or self.config.classification:
            images = matched(self.flow, self.data.held_out)
        if self.config.samples:
            for scale in self._scales:
                guidance = Guidance.from_config(replace(self.sampling, guidance=scale))
                guidance.check(bool(self.flow.config.num_classes))
            if self._flow_settings()["denoise_levels"]:
                denoising = Denoising.from_config(self.sampling)
                denoising.check(bool(self.flow.config.num_classes), self.data.codec.vae is not None)
            judge = _judge(
                *(self.data.reference, self.config, self.config.samples, self.sampling.batch_size),
                *(self.processes, self.progress),
            )
            codec = open_codec(self.data.codec, self.flow.device, self.config.vae, self.config.force_vae)
        data = to_dict(self.data.config) if self.data.config is not None else None
        parts = [_Part({}, {**weights_of(self.flow), "data": data, "seed": self.config.seed}, [])]
        if isinstance(self.flow, Flow) and images is not None:
            parts.append(self._held_out(self.flow, images))
        if judge is not None and codec is not None:
            parts.append(self._quality(judge, codec))
            if teacher is not None and images is not None:
                scale = parts[-1].figures.get("best_guidance", self._scales[0])
                parts.append(self._distilled(teacher, scale, images, judge, codec))
        figures = {name: value for part in parts for name, value in part.figures.items()}
        settings = {name: value for part in parts for name, value in part.settings.items()}
        warnings = tuple(sentence for part in parts for sentence in part.warnings)
        return Report("evaluate", figures, settings, warnings, environment(self.flow.device))

    def _held_out(self, flow: Flow, images: ImageSet) -> _Part:
        """Likelihood and classification."""
        config = self.config
        loop: LoopOptions = {
            "limit": config.limit,
            "seed": config.seed,
            "batch_size": self.sampling.batch_size,
            "share": self.processes.share,
            "progress": self.progress,
            "level": config.level,
        }
        labelled = bool(flow.config.num_classes) and images.labels is not None
        figures: dict[str, Any] = {}
        if config.likelihood:
            result_of_likelihood = self.processes.merged(likelihood(flow, images, config.draws, **loop))
            estimates = {"nll": result_of_likelihood.nll, "bits_per_dim": result_of_likelihood.bits_per_dim}
            if images.in_pixels is not images:
                del estimates["bits_per_dim"]  # of 8-bit pixels, which latents are not
            for name, estimate in estimates.items():
                figures[name] = estimate.mean
                figures[f"{name}_error"], figures[f"{name}_draw_error"] = estimate.error, estimate.draw_error
        for method in default_methods(flow) if config.classification and labelled else ():
            result = self.processes.merged(accuracy(flow, images, method, **loop))
            figures[f"top1_{method}"], figures[f"top5_{method}"] = result.top1, result.top5
        settings = {
            "images": images.name,
            "images_hash": self.data.held_out.fingerprint,
            "limit": config.limit,
            "draws": config.draws,
            **({"noise": self._level} if self.flow.config.noise == "range" else {}),
            "labels": "each image's own" if labelled else None,
        }
        return _Part(figures, {"held_out": settings}, [])

    def _quality(self, judge: Judge, codec: Codec) -> _Part:
        """Samples at each guidance scale, judged."""
        rows: list[dict[str, float]] = []
        samplers: list[Any] = []
        warnings = []
        numbers = evenly(self.config.samples, share=self.processes.share)
        for scale in self._scales:
            options = replace(self.sampling, guidance=scale)
            plans, notice = self.plans, None
            if plans is None and isinstance(self.flow, Flow):
                plans, notice = resolve_plan(self.flow, options, self.flow.folder)
            sampler = self.flow.sampler(options, plans)
            faults = Faults()
            drawn = self._draw(sampler, codec, numbers, faults, f"sampling, guidance {scale:g}")
            samples = self.processes.merged(judge.gather(drawn, self.config.samples, _start(numbers)))
            rows.append({"guidance": scale, **judge.figures(samples)})
            samplers.append(_named(sampler, plans))
            note = f"At guidance {scale:g}, " if len(self._scales) > 1 else ""
            sentences = [*([notice] if notice else []), *self.processes.merged(faults).sentences()]
            warnings += [note + sentence for sentence in sentences]
        name = deciding_figure(rows[0])
        best = min(rows, key=lambda row: row[name])
        figures: dict[str, Any] = {key: value for key, value in best.items() if key != "guidance"}
        if len(rows) > 1:
            figures |= {"guidance": rows, "best_guidance": best["guidance"]}
            if best["guidance"] in (min(self._scales), max(self._scales)):
                warnings.append("The best guidance lies at the edge of the search: widen the range.")
        judged = _judge_settings(judge, self.config, self.config.samples)
        settings = self._sampling_settings(samplers) | judged
        return _Part(figures, settings, warnings + judge.warnings(self.config.samples))

    def _distilled(self, teacher: Flow, scale: float, images: ImageSet, judge: Judge, codec: Codec) -> _Part:
        """A student beside its teacher, from the same noise."""
        assert isinstance(self.flow, Student)
        config, faults, share = self.config, Faults(), self.processes.share
        options = replace(self.sampling, guidance=scale)

        def to_pixels(drawn: Tensor) -> Tensor:
            return quantise(codec.decode(drawn), ["a sample"] * len(drawn), faults, "nearest")

        parts = in_batches(evenly(config.samples, share=share), options.batch_size)
        shown = track(parts, len(parts), "beside the teacher", "batches") if self.progress else parts
        level = self._level if teacher.config.noise == "range" else None
        drawing, exact = self.flow.sampler(options), teacher.sampler(options.exact)
        pairs = draw_pairs(teacher, drawing, exact, judge, to_pixels, shown, config.seed, level)
        loop: LoopOptions = {
            "limit": config.limit or config.samples,
            "seed": config.seed,
            "batch_size": options.batch_size,
            "share": share,
            "progress": self.progress,
            "level": level,
        }
        test = under_teacher(teacher, held_out_batches(teacher, images, "test images", **loop))
        figures = self.processes.merged(pairs).figures(judge.encoded)
        figures |= self.processes.merged(test).figures("test")
        settings = {"teacher": weights_of(teacher), "student": to_dict(self.flow.student)}
        return _Part(figures, settings, [])

    @property
    def _level(self) -> float | None:
        """Noise level of the test images."""
        return self.flow.config.noise_level if self.config.level is None else self.config.level

    def _flow_settings(self) -> dict[str, Any]:
        """Levels that a flow draws and denoises at; a student draws clean images."""
        if not isinstance(self.flow, Flow):
            return {"noise": None, "denoise": False, "denoise_levels": []}
        first, denoise = drawing_level(self.flow, self.sampling.noise), self.sampling.denoise
        levels = Denoising.from_config(self.sampling).levels(self.flow, first) if denoise else ()
        denoise = denoise and denoises(self.flow)
        return {"noise": first, "denoise": denoise, "denoise_levels": list(levels)}

    @property
    def _scales(self) -> tuple[float, ...]:
        return self.config.search or (self.sampling.guidance,)

    def _draw(
        self,
        sampler: Sampler | StudentSampler,
        codec: Codec,
        numbers: Int64[Tensor, " n"],
        faults: Faults,
        description: str,
    ) -> Iterator[UInt8[Tensor, "_ c h w"]]:
        """Samples in batches: sample i has seed ``seed + i`` and class i modulo their number."""
        classes, rounding = self.flow.config.num_classes or 0, _rounding(self.config.protocol)
        parts = in_batches(numbers, self.sampling.batch_size)
        for index in track(parts, len(parts), description, "batches") if self.progress else parts:
            seeds = (self.config.seed + index).tolist()
            labels = (index % classes).tolist() if classes else None
            images = sampler(labels, seeds)
            broken = torch.nonzero(~images.flatten(1).isfinite().all(1)).flatten().tolist()
            if broken:
                again = [labels[row] for row in broken] if labels else None
                places = sampler.overflows(again, [seeds[row] for row in broken])
                faults.stages.update(place.stage for place in places if place)
            names = [f"seed {seed}" for seed in seeds]
            yield quantise(codec.decode(images), names, faults, rounding).cpu()

    def _sampling_settings(self, samplers: list[Any]) -> dict[str, Any]:
        exact = all(sampler == "sequential" for sampler in samplers)
        one = len(self._scales) == 1
        return {
            **to_dict(self.sampling),
            "samples": self.config.samples,
            "guidance": self._scales[0] if one else list(self._scales),
            "sampler": samplers[0] if one else samplers,
            "tolerance": 0 if exact else self.sampling.tolerance,
            **self._flow_settings(),
        }


def _named(sampler: Sampler | StudentSampler, plans: Sequence[BlockPlan] | None) -> Any:
    """How images were drawn, for the record."""
    if isinstance(sampler, StudentSampler):
        return {"evaluations": sampler.evaluations, "solver": sampler.solver}
    return (
        "sequential" if plans is None and sampler.guess is None else [asdict(plan) for plan in sampler.plans]
    )


def deciding_figure(figures: dict[str, float]) -> str:
    """The figure that chooses the guidance scale, lower being better: the first that there is."""
    return next(name for name in ("fid", "fid_tarflow", "fd_efficientnet_lite0") if name in figures)


def _start(numbers: Int64[Tensor, " n"]) -> int:
    return int(numbers[0]) if len(numbers) else 0


def _rounding(protocol: Protocol) -> Rounding:
    return "truncate" if protocol == "tarflow" else "nearest"


_FOR_EACH, _FEWEST = 10, 2000


def reference_limit(config: EvaluateConfig, samples: int) -> int | None:
    """Images of the reference that ``samples`` are compared with; None is all.

    ``auto`` takes 10 for each sample: a Fréchet distance grows with 1/n of either side, so that the reference
    adds a tenth of what the samples add. With 2,000 at least, a covariance of 112 features is filled. Under a
    published protocol it takes all.

    Example:
        >>> [reference_limit(EvaluateConfig(), samples) for samples in (64, 1024)]
        [2000, 10240]
    """
    if config.reference_limit != "auto":
        return config.reference_limit
    return max(_FEWEST, _FOR_EACH * samples) if config.protocol == "none" else None


def _judge(
    reference: Reference,
    config: EvaluateConfig,
    samples: int,
    batch_size: int,
    processes: Processes,
    progress: bool,
) -> Judge:
    reference = reference.limited(reference_limit(config, samples))
    with processes.main_first():  # one downloads and computes the reference, the others find it
        inception = None
        if config.protocol != "none":
            inception = load_inception(config.inception_weights, processes.device)
        encoder = create_encoder("efficientnet_lite0").to(processes.device)
        return Judge(reference, encoder, config.protocol, inception, batch_size, progress)


def _judge_settings(judge: Judge, config: EvaluateConfig, samples: int) -> dict[str, Any]:
    inception, reference = judge.inception, judge.reference
    return {
        "protocol": judge.protocol,
        "rounding": _rounding(judge.protocol),
        "reference": reference.name,
        "reference_hash": reference.fingerprint,
        "reference_limit": reference_limit(config, samples),
        "reference_images": len(reference.images) if reference.images is not None else None,
        "reference_statistics_included": reference.pool is not None,
        "resize": "references: shorter side to the samples' size, then centre crop; networks: their own",
        "encoder_hash": judge.encoder.fingerprint,
        "inception_hash": inception.fingerprint if inception is not None else None,
    }
