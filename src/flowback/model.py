"""The public models: a flow and its students, with class names, files and sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor

from flowback import checkpoint
from flowback.config import DataConfig, ModelConfig, RunConfig, SampleConfig, StudentConfig
from flowback.data.load import UNNAMED
from flowback.devices import pick_device
from flowback.errors import InputError, nearest
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.cost import parameters
from flowback.flow.image_model import ImageModel, UserLabels
from flowback.flow.levels import UserLevels
from flowback.flow.likelihood import add_noise
from flowback.presets import get_preset
from flowback.sampling import BlockPlan, Sampler, sample
from flowback.sampling.block_plan import weights_hash
from flowback.students.network import StudentNetwork
from flowback.students.refine import refined_sampler
from flowback.students.sampler import StudentSampler

__all__ = ["Flow", "NamedModel", "Student", "create_flow", "load", "load_teacher"]


class NamedModel(ImageModel):
    """What a model has beside its mathematics: class names, settings of its run, files."""

    classes: tuple[str, ...]
    """Names of the classes; empty if unconditional or unknown."""
    run: RunConfig | None
    """All settings of the run that trained it; None for a new model."""
    folder: Path | None
    """Checkpoint folder that its weights were read from; None for a new model."""

    def _name(self, classes: Sequence[str]) -> None:
        self.classes, self.run, self.folder = tuple(classes), None, None
        count = self.config.num_classes or 0
        if self.classes and len(self.classes) != count:
            raise InputError(
                f"{len(self.classes)} class names for a model of {count} classes; "
                "give one for each, in the order of their ids."
            )

    def labels(self, labels: UserLabels, batch: int) -> Labels:
        """Labels as a tensor on the flow's device; names become ids, ids and weights stay as they are.

        Raises:
            InputError: an unknown name, ids out of range, a wrong count, or weights of another size.
        """
        if isinstance(labels, str):
            labels = [labels] * batch
        if isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
            labels = [self._class_id(label) if isinstance(label, str) else label for label in labels]
        return super().labels(labels, batch)

    def _class_id(self, name: str) -> int:
        if self.classes.count(name) > 1:
            raise InputError(f"The model has {self.classes.count(name)} classes called {name}; give an id.")
        if name in self.classes:
            return self.classes.index(name)
        if not self.classes:
            raise InputError(f"The model does not know the names of its classes; give {name!r} as an id.")
        raise InputError(f"The model has no class {name!r}; {nearest(name, self.classes)}")

    def _read(self, folder: Path, run: RunConfig, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint, as they are.

        Raises:
            InputError: they are of another model.
        """
        try:
            self.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"The weights in {folder} do not fit its config.json: {reason}") from None
        self.run, self.folder = run, folder

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that ``from_pretrained`` reads: config.json and model.safetensors.

        The folder appears complete or not at all; an existing checkpoint is replaced.

        Raises:
            InputError: the folder holds something else, or cannot be written.
        """
        run = self.run or RunConfig(data=DataConfig(UNNAMED))
        config = replace(run, model=self.config, classes=self.classes, **self._own_settings())
        checkpoint.save(Path(folder), config, self.state_dict())

    def _own_settings(self) -> dict[str, Any]:
        """Sections of the settings beside the model's."""
        return {}


class Flow(NamedModel, TARFlow):
    """A TARFlow with class names, files and sampling; the mathematics is in :class:`TARFlow`.

    Labels are class ids, class names, soft class weights (B, K), or None for unconditional.

    Args:
        config: the model.
        classes: names of the classes, in the order of their ids; empty if unknown.

    Raises:
        InputError: the number of names is not the number of classes.

    Example:
        >>> import torch
        >>> from flowback import Flow, ModelConfig
        >>> flow = Flow(ModelConfig(image_size=8, channels=1, patch_size=2, width=32, blocks=2,
        ...                         layers=1, head_dim=16, num_classes=2), classes=("cat", "dog"))
        >>> out = flow(torch.zeros(2, 1, 8, 8), ["cat", "dog"])
        >>> out.z.shape, out.log_det.shape
        (torch.Size([2, 16, 4]), torch.Size([2]))
        >>> flow.sample(labels=["dog", "cat", "cat"], seeds=[7, 8, 9], guidance=1.5).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, config: ModelConfig, classes: Sequence[str] = ()) -> None:
        super().__init__(config)
        self._name(classes)

    def add_noise(
        self, images: Float[Tensor, "b c h w"], seeds: Sequence[int], *, noise: UserLevels = None
    ) -> Float[Tensor, "b c h w"]:
        """Images on [-1, 1] with the training noise added; the flow's density is that of such images.

        Args:
            images: clean images.
            seeds: one per image, not negative; the noise depends only on them.
            noise: its level, for a flow with a range of them.

        Raises:
            InputError: a level that the flow does not have.
        """
        levels = self.levels(noise, len(images))
        return add_noise(images, self.config, seeds, levels=None if levels is None else levels.to(images))

    def sample(
        self, labels: UserLabels = None, seeds: Sequence[int] | Tensor | None = None, **options: Any
    ) -> Float[Tensor, "b c h w"]:
        """Draw images on [-1, 1], not clamped; :func:`flowback.sample` explains the options.

        For many batches use :class:`flowback.Sampler`, which prepares the weights only once.
        """
        return sample(self, labels, seeds, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        ema: float | None = None,
        revision: str | None = None,
    ) -> Flow:
        """Load a flow with its averaged weights, in eval mode.

        Args:
            name: a run's folder (its newest checkpoint), a checkpoint folder, or a repository on the Hugging
                Face Hub, as ``owner/name``.
            device: where the weights go; ``auto`` is a GPU if there is one.
            ema: decay of the average to load, if the run kept several; None is its main one.
            revision: branch, tag or commit of the repository.

        Raises:
            InputError: there is no such device, or no checkpoint that this flowback can read.
        """
        device = pick_device(device)
        folder = checkpoint.resolve(checkpoint.fetch(name, revision))
        config, weights = checkpoint.load_weights(folder, device, ema)
        if config.student.active:
            raise InputError(
                f"{folder} holds a student, not a flow; give its teacher, {config.student.teacher}, for what "
                "only a flow can do."
            )
        held, needed = sum(value.numel() for value in weights.values()), parameters(config.model)
        if held != needed:  # before a model of any size is built
            raise InputError(
                f"The weights in {folder} do not fit its config.json: they are {held:,} numbers, "
                f"and its model takes {needed:,}."
            )
        with init_empty_weights(include_buffers=False):  # the weights are about to come
            flow = cls(config.model, config.classes)
        flow._read(folder, config, weights)
        return flow.to(device).eval()

    def sampler(self, config: SampleConfig, plans: Sequence[BlockPlan] | None = None) -> Sampler:
        """What draws images as the options say; see :meth:`flowback.Sampler.from_config`."""
        return Sampler.from_config(self, config, plans)


class Student(NamedModel, StudentNetwork):
    """A student of a flow, with class names, files and sampling; see :func:`flowback.distil`.

    Args:
        config: the teacher's model.
        student: the student's own settings.
        classes: names of the classes, in the order of their ids; empty if unknown.

    Raises:
        InputError: the number of names is not the number of classes.

    Example:
        >>> import flowback
        >>> model = flowback.ModelConfig(image_size=8, channels=1, patch_size=2, width=32, blocks=2, layers=1,
        ...                              head_dim=16, num_classes=2)
        >>> student = flowback.Student(model, flowback.StudentConfig("matching"), classes=("cat", "dog"))
        >>> student.sample(labels=["dog", "cat"], seeds=[7, 8], evaluations=4).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: ModelConfig, student: StudentConfig, classes: Sequence[str] = ()) -> None:
        super().__init__(config, student)
        self._name(classes)

    def _own_settings(self) -> dict[str, Any]:
        return {"student": self.student}

    def sample(
        self, labels: UserLabels = None, seeds: Sequence[int] | Tensor | None = None, **options: Any
    ) -> Float[Tensor, "b c h w"]:
        """Draw images on [-1, 1], not clamped; the options are those of a ``StudentSampler``."""
        return StudentSampler(self, **options)(labels, seeds)

    def sampler(
        self, config: SampleConfig, plans: Sequence[BlockPlan] | None = None
    ) -> StudentSampler | Sampler:
        """What draws images as the options say.

        Raises:
            InputError: options that are none of a student's.
        """
        del plans
        if config.sampler == "student+exact":
            return refined_sampler(load_teacher(self.student, self.device, config.teacher), self, config)
        if config.sampler not in ("sequential", "auto"):
            raise InputError(
                f"--sampler {config.sampler} is of flows; a student draws without it, or with "
                "--sampler student+exact."
            )
        return StudentSampler.from_config(self, config)

    def teacher_sampler(self, config: SampleConfig) -> Sampler:
        """What draws the teacher's own images, exactly, as the options say.

        Raises:
            InputError: see :func:`load_teacher`.
        """
        return load_teacher(self.student, self.device, config.teacher).sampler(config.exact)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str = "cpu",
        ema: float | None = None,
        revision: str | None = None,
    ) -> Student:
        """Load a student with its averaged weights, in eval mode; see :meth:`Flow.from_pretrained`.

        Raises:
            InputError: there is no such device, or no checkpoint of a student.
        """
        device = pick_device(device)
        folder = checkpoint.resolve(checkpoint.fetch(name, revision))
        config, weights = checkpoint.load_weights(folder, device, ema)
        if not config.student.active:
            raise InputError(f"{folder} holds a flow, not a student; make one with flowback distil.")
        with init_empty_weights(include_buffers=False):
            student = cls(config.model, config.student, config.classes)
        student._read(folder, config, weights)
        return student.to(device).eval()


def load_teacher(config: StudentConfig, device: torch.device | str = "cpu", where: str | None = None) -> Flow:
    """The flow that a student learned from.

    Args:
        config: the student's.
        device: where it goes.
        where: its checkpoint now, if it has moved.

    Raises:
        InputError: it is not there, or its weights are not those that the student learned from.
    """
    name = where or config.teacher
    if name is None:
        raise InputError("The student does not say who its teacher is; give its checkpoint as --teacher.")
    try:
        teacher = Flow.from_pretrained(name, device)
    except InputError as error:
        raise InputError(f"The student's teacher cannot be used: {error} Give it as --teacher.") from None
    if config.teacher_weights not in (None, found := weights_hash(teacher)):
        raise InputError(
            f"{name} is not the student's teacher: the SHA-256 of its weights is {found[:12]}..., not "
            f"{str(config.teacher_weights)[:12]}...; give the right checkpoint as --teacher."
        )
    return teacher


def load(name: str | Path, device: torch.device | str = "cpu", ema: float | None = None) -> Any:
    """Load a :class:`Flow` or :class:`Student` from a folder or the Hub; see :meth:`Flow.from_pretrained`."""
    folder = checkpoint.resolve(checkpoint.fetch(name))
    kind = Student if checkpoint.load_config(folder).student.active else Flow
    return kind.from_pretrained(folder, device, ema)


def create_flow(
    preset: str, num_classes: int | None = None, classes: Sequence[str] = (), **model: Any
) -> Flow:
    """A preset's flow with new weights, drawn from PyTorch's global random generator.

    Args:
        preset: its name; :func:`flowback.list_presets` lists them.
        num_classes: number of classes; None takes the number of ``classes``, or else the preset's.
        classes: names of the classes.
        **model: fields of :class:`flowback.ModelConfig` that replace the preset's.

    Raises:
        InputError: no such preset, or a value out of range.

    Example:
        >>> import flowback
        >>> flow = flowback.create_flow("digits", num_classes=10, width=32)
        >>> flow.config.width, flow.config.num_classes
        (32, 10)
    """
    config = get_preset(preset).config.model
    count = num_classes if num_classes is not None else len(classes) or config.num_classes
    unknown = [name for name in model if name not in vars(config)]
    if unknown:
        raise InputError(f"The model has no option {unknown[0]}; {nearest(unknown[0], vars(config))}")
    return Flow(replace(config, num_classes=count, **model), classes)
