"""Training as one call: data, class names, targets and held-out figures in, a trained flow or student out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flowback import heap
from flowback.alignment.targets import make_targets
from flowback.config import AlignmentConfig, RunConfig, StudentConfig
from flowback.data.image_set import AnyImages, ImageSet, as_image_set, labelled, match_classes
from flowback.data.load import UNNAMED, load_images
from flowback.errors import InputError
from flowback.evaluation.held_out import held_out_batches, matched
from flowback.files import check_outside, located
from flowback.folder_lock import folder_lock
from flowback.model import Flow, Student
from flowback.sampling.block_plan import weights_hash
from flowback.students.losses import encode_states, state_rms
from flowback.training.distributed import noticing_loss, start
from flowback.training.evaluators import (
    Evaluator,
    frechet_evaluator,
    likelihood_evaluator,
    picture_evaluator,
)
from flowback.training.loop import train_loop
from flowback.training.objective import Targets
from flowback.training.run_folder import RunFolder

log = logging.getLogger("flowback")

__all__ = ["TrainResult", "distil", "open_images", "student_config", "train"]


@dataclass(frozen=True)
class TrainResult:
    """A run that reached its last step."""

    config: RunConfig
    """All settings, completed from the data: number and names of the classes, the VAE."""
    folder: Path
    """The run's folder."""
    images: ImageSet
    """The training images."""
    test: ImageSet | None
    """The held-out images; None if there are none."""
    metrics: dict[str, Any]
    """The last row of metrics: ``step``, ``images``, ``nll``, ``seconds`` of training alone, ..."""
    device: torch.device
    """Where this process trained."""

    @cached_property
    def flow(self) -> Flow:
        """The flow with its averaged weights, its class names and its settings, read from the folder."""
        return Flow.from_pretrained(self.folder, self.device)

    @cached_property
    def student(self) -> Student:
        """The student that :func:`flowback.distil` trained, likewise."""
        return Student.from_pretrained(self.folder, self.device)


def train(
    config: RunConfig,
    images: AnyImages | None = None,
    out: Path | str = "runs/train",
    *,
    test: AnyImages | None = None,
    targets: Targets | None = None,
    evaluators: Sequence[Evaluator] = (),
    description: str = "train",
) -> TrainResult:
    """Train a flow until ``config.train.steps``: what ``flowback train`` does.

    Call it again on the same folder to continue where it stopped, bit for bit. Started by ``torchrun`` or
    ``accelerate launch``, all processes call it with the same arguments and see the same folder.

    Args:
        config: the settings, ``flowback.get_preset(name).config`` for example. Number and names of the
            classes and the VAE are taken from the images.
        images: the training images; None loads those that ``config.data`` names. Of images that you give,
            the checkpoint keeps only the class names (``data.name`` is `none`), so ``flowback evaluate`` then
            needs ``--data``.
        out: the run's folder: config.json, environment.json, metrics.jsonl, checkpoints/.
        test: held-out images for the figures during training; their classes are matched by name. None takes
            those of ``config.data`` if the training images come from there too; otherwise there are no such
            figures.
        targets: gives the encoder's features of a batch; None makes them from ``config.alignment``.
        evaluators: called at their intervals, beside those of ``config.train``.
        description: shown beside the progress bar.

    Raises:
        InputError: images that cannot be read or do not fit the model, a folder with another run, or options
            changed that must not.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        ProcessLostError: another process of the run died; the last checkpoint remains.

    Example:
        >>> import tempfile, flowback
        >>> model = flowback.ModelConfig(image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1,
        ...                              head_dim=8)
        >>> steps = flowback.TrainConfig(steps=2, batch_size=8, device="cpu")
        >>> config = flowback.RunConfig(model, train=steps)
        >>> result = flowback.train(config, out=tempfile.mkdtemp())  # scikit-learn's digits
        >>> result.metrics["step"], result.flow.classes[:3]
        (2, ('0', '1', '2'))
    """
    if config.student.active:
        raise InputError(
            f"These settings train a student (--student.method {config.student.method}); use flowback distil."
        )
    return _run(config, images, Path(out), test, targets, evaluators, description)


def distil(
    teacher: str | Path,
    images: AnyImages | None = None,
    out: Path | str = "runs/distil",
    *,
    config: RunConfig | None = None,
    evaluators: Sequence[Evaluator] = (),
    description: str = "distil",
    **student: Any,
) -> TrainResult:
    """Train a student of a flow until ``config.train.steps``: what ``flowback distil`` does.

    The flow only encodes, and is not changed. All else is as in :func:`flowback.train`.

    Args:
        teacher: run, checkpoint, or name on the Hub.
        images: the training images; None loads those that ``config.data`` names.
        out: the student's run.
        config: the settings; None takes :func:`student_config`, those of the teacher's own training.
        evaluators: called at their intervals with the averaged student, beside those of ``config.train``.
        description: shown beside the progress bar.
        **student: fields of :class:`flowback.StudentConfig` that replace those of ``config.student``.

    Raises:
        InputError: a teacher that cannot be read or is a student itself, images that do not fit it, or what
            :func:`flowback.train` refuses.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        ProcessLostError: another process of the run died; the last checkpoint remains.

    Example:
        >>> import tempfile, flowback
        >>> model = flowback.ModelConfig(image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1,
        ...                              head_dim=8)
        >>> steps = flowback.TrainConfig(steps=2, batch_size=8, device="cpu")
        >>> run = flowback.train(flowback.RunConfig(model, train=steps), out=tempfile.mkdtemp()).folder
        >>> result = flowback.distil(run, out=tempfile.mkdtemp(), method="inverse")
        >>> result.student.sample([3, 7], seeds=[0, 1]).shape
        torch.Size([2, 1, 8, 8])
    """
    flow = Flow.from_pretrained(teacher)
    config = config or student_config(flow)
    options = replace(config.student, **{"teacher": located(str(teacher)), **student})
    if not options.active:
        options = replace(options, method="inverse")
    config = replace(config, model=flow.config, classes=flow.classes, student=options)
    return _run(config, images, Path(out), None, None, evaluators, description, flow)


def student_config(flow: Flow) -> RunConfig:
    """Settings of a student's training: data, codec, steps and batch are those of the flow's own run.

    Raises:
        InputError: the flow does not come from a run.
    """
    if flow.run is None:
        raise InputError("The flow does not come from a run; give the settings of the training as config=...")
    train = replace(flow.run.train, init_from=None, diagnose_every=0, compile=False)
    return replace(flow.run, alignment=AlignmentConfig(), train=train, student=StudentConfig("inverse"))


def _run(
    config: RunConfig,
    images: AnyImages | None,
    out: Path,
    test: AnyImages | None,
    targets: Targets | None,
    evaluators: Sequence[Evaluator],
    description: str,
    teacher: Flow | None = None,
) -> TrainResult:
    """Load what the settings name, complete them from it, and train."""
    heap.keep_freed()
    state = start(config.train)
    if state.is_main_process:
        RunFolder(out, config).check()
        if images is None and config.data.folder is not None:
            check_outside(out, config.data.folder)
    config, images, test = open_images(config, images, test)
    if teacher is not None:
        config = replace(config, student=_measured(config.student, teacher, images))
    built_in = [] if test is None or teacher is not None else [likelihood_evaluator(config, test)]
    if config.train.frechet_every:
        built_in.append(frechet_evaluator(config, images))
    if config.train.sample_every:
        built_in.append(picture_evaluator(config, out / "samples"))
    with folder_lock(out, state.is_main_process):
        if targets is None and teacher is None:
            with noticing_loss(state), state.main_process_first():  # it computes the features that all read
                targets = make_targets(config, images, device=state.device)
        metrics = train_loop(config, images, out, targets, [*built_in, *evaluators], description)
    return TrainResult(config, out, images, test, metrics, state.device)


def open_images(
    config: RunConfig, images: AnyImages | None = None, test: AnyImages | None = None
) -> tuple[RunConfig, ImageSet, ImageSet | None]:
    """The images of a run, checked, and its settings completed from them; see :func:`train`.

    Raises:
        InputError: images that cannot be read or do not fit the model.
    """
    model = config.model
    config = replace(config, **_placed(config, named=images is None))
    if images is None:
        images, own_test = (
            load_images(config.data, model.image_size, model.channels, split) for split in ("train", "test")
        )
        test = own_test if test is None else test
    images, test = as_image_set(images), None if test is None else as_image_set(test)
    config = _resolve(config, images)
    for part in (images,) if test is None else (images, test):
        _check_images(part, config)
    if config.train.batch_size > len(images):
        log.warning(
            "--train.batch-size %d is larger than the set: a step sees each of its %s images more than once.",
            *(config.train.batch_size, f"{len(images):,}"),
        )
    if config.data.labelled is not None and config.model.num_classes:
        labelled(images, config.data.labelled)  # refuses numbers that leave a class without any
    return config, images, None if test is None else match_classes(test, config.classes)


def _placed(config: RunConfig, named: bool) -> dict[str, Any]:
    """The sections with paths, as they are found from any folder; images that were given have no name."""
    data, alignment, codec, train = config.data, config.alignment, config.codec, config.train
    paths = {name: getattr(alignment, name) for name in ("weights", "originals_path")}
    return {
        "data": replace(data, path=data.path and data.path.absolute())
        if named
        else replace(data, name=UNNAMED, path=None),
        "alignment": replace(alignment, **{name: path and path.absolute() for name, path in paths.items()}),
        "codec": replace(codec, vae=codec.vae and located(codec.vae)),
        "train": replace(train, init_from=train.init_from and located(train.init_from)),
    }


_MEASURED = 1024
"""Images on which the teacher's states are measured."""


def _measured(config: StudentConfig, teacher: Flow, images: ImageSet) -> StudentConfig:
    """The student's settings with the hash of its teacher, and the sizes of the teacher's states.

    Raises:
        InputError: the settings name other weights.
    """
    found = weights_hash(teacher)
    if config.teacher_weights not in (None, found):
        raise InputError(
            f"--student.teacher-weights is {config.teacher_weights}, and {config.teacher} has {found}; "
            "leave it out."
        )
    rms = config.rms
    if not rms:
        part = matched(teacher, images)
        highest = teacher.config.noise_max if teacher.config.noise == "range" else None
        batches = held_out_batches(teacher, part, limit=_MEASURED, batch_size=256, level=highest)
        states = [encode_states(teacher, batch.noised(teacher.config), batch.labels) for batch in batches]
        rms = state_rms([torch.cat(parts) for parts in zip(*states, strict=True)])
    elif len(rms) != teacher.config.blocks + 1:
        raise InputError(
            f"--student.rms has {len(rms)} values, and the teacher {teacher.config.blocks + 1} states; leave "
            "it out."
        )
    return replace(config, teacher_weights=found, rms=rms)


def _resolve(config: RunConfig, images: ImageSet) -> RunConfig:
    """Take the classes and the VAE from the data; refuse others in the settings."""
    asked, stored = config.codec, images.codec
    other = asked.weights is not None and asked.weights != stored.weights
    if asked.vae is not None and (asked.vae != stored.vae or other):
        content = f"latents of {stored.vae}" if stored.vae else "pixels"
        raise InputError(
            f"The settings ask for latents of --codec.vae {asked.vae}, but {images.name} holds {content}; "
            f"prepare the data with --vae {asked.vae}, or set --codec.vae {stored.vae}."
        )
    model = config.model
    if model.num_classes is None:
        model = replace(model, num_classes=len(images.classes))
    classes = tuple(images.classes) if model.num_classes == len(images.classes) else ()
    if config.classes and config.classes != classes:
        raise InputError(
            f"The settings name the classes {', '.join(config.classes)}, but those of {images.name} are "
            f"{', '.join(images.classes) or 'not named'}; give the data of those classes, in this order."
        )
    return replace(config, model=model, codec=stored, classes=classes)


def _check_images(images: ImageSet, config: RunConfig) -> None:
    """Refuse a set that is empty, or of other images than the model's."""
    if len(images) == 0:
        raise InputError(f"{images.name} has no images.")
    shape, size = tuple(images.read(torch.tensor([0])).shape[1:]), config.model.image_size
    if shape != (config.model.channels, size, size):
        raise InputError(
            f"{images.name} has images of shape {shape}, but the model takes "
            f"({config.model.channels}, {size}, {size}); set --model.channels and "
            "--model.image-size, or give images of that size."
        )
