"""The public models: a flow and its students, with class names, files and sampling."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Bool, Float
from torch import Tensor

from flowback import checkpoint, hub
from flowback.config import ModelConfig, RunConfig, StudentConfig
from flowback.devices import pick_device
from flowback.errors import InputError, nearest
from flowback.flow import TARFlow
from flowback.flow.cost import parameters
from flowback.flow.image_model import UserLabels
from flowback.flow.levels import UserLevels
from flowback.flow.likelihood import add_noise
from flowback.model_card import Card, about, card_text, public, public_config, read_record
from flowback.named_model import NamedModel
from flowback.presets import get_preset
from flowback.sampling import BlockPlan, Inpainted, Sampler, inpaint, interpolate, sample
from flowback.sampling.block_plan import weights_hash
from flowback.sampling.image_files import save_grid
from flowback.students.network import StudentNetwork
from flowback.students.refine import refined_sampler
from flowback.students.sampler import StudentSampler
from flowback.task_config import SampleConfig

__all__ = ["Flow", "Student", "create_flow", "load", "load_teacher"]

_PICTURED = 10
"""Most classes in the picture of a model card."""


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
        self.set_names(classes)

    def add_noise(
        self, images: Float[Tensor, "b c h w"], seeds: Sequence[int], *, noise: UserLevels = None
    ) -> Float[Tensor, "b c h w"]:
        """Images on [-1, 1] with the training noise added; the flow's density is that of such images.

        Args:
            images: clean images.
            seeds: one per image, not negative; the noise depends only on them.
            noise: its level, for a flow with a range of them.

        Raises:
            InputError: images that :meth:`check_images` refuses, or a level that the flow does not have.
        """
        self.check_images(images)
        levels = self.levels(noise, len(images))
        return add_noise(images, self.config, seeds, levels=None if levels is None else levels.to(images))

    def sample(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Tensor | None = None,
        *,
        count: int | None = None,
        **options: Any,
    ) -> Float[Tensor, "b c h w"]:
        """Draw images on [-1, 1], raw: not clamped, not rounded; :func:`flowback.to_pil` makes pictures.

        For many batches use :class:`flowback.Sampler`, which prepares the weights only once.

        Args:
            labels: one for each image, or one for all; None is unconditional.
            seeds: one for each image; None: 0, 1, 2, ...
            count: number of images, in place of ``seeds``; fewer labels take turns.
            **options: those of :func:`flowback.sample`.

        Raises:
            InputError: labels, seeds, count or options that do not fit the model or each other.
        """
        if count is not None:
            if seeds is not None or count < 1:
                raise InputError(f"count={count}: give a number of images, at least 1, or seeds, not both.")
            seeds = range(count)
            if isinstance(labels, (list, tuple)) and labels:
                labels = [labels[number % len(labels)] for number in seeds]
        return sample(self, labels, seeds, **options)

    def trajectory(
        self, labels: UserLabels = None, seeds: Sequence[int] | Tensor | None = None, **options: Any
    ) -> list[Float[Tensor, "b c h w"]]:
        """The way from noise to images: z, the outputs of blocks T ... 1, and the denoised images.

        The last are those of :meth:`sample` with the same arguments. Options are those of
        :class:`flowback.Sampler`, whose method ``follow`` gives each state as soon as it is there.
        """
        return Sampler(self, **options).trajectory(labels, seeds)

    def interpolate(
        self,
        first: Float[Tensor, "b c h w"],
        second: Float[Tensor, "other c h w"],
        steps: int = 9,
        labels: UserLabels = None,
        second_labels: UserLabels = None,
        **options: Any,
    ) -> Float[Tensor, "b s c h w"]:
        """Images between two, equally spaced in z; :func:`flowback.sampling.interpolate` explains it."""
        return interpolate(self, first, second, steps, labels, second_labels, **options)

    def inpaint(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Bool[Tensor, "m n"],
        labels: UserLabels = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Inpainted:
        """Keep some tokens and redraw the others; :func:`flowback.sampling.inpaint` explains it."""
        return inpaint(self, images, keep, labels, seeds, **options)

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
            name: a run's folder (its newest checkpoint), a checkpoint folder, a flow that comes with the
                package (``fashion``), or a repository on the Hugging Face Hub, as ``owner/name`` or
                ``owner/name@revision``. Nothing of it is unpickled or run.
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
        flow.take(folder, config, weights)
        return flow.to(device).eval()

    def sampler(self, config: SampleConfig, plans: Sequence[BlockPlan] | None = None) -> Sampler:
        """What draws images as the options say; see :meth:`flowback.Sampler.from_config`."""
        return Sampler.from_config(self, config, plans)

    @property
    def about(self) -> str:
        """What the flow is, in one sentence: its size, images, data and training."""
        return about(self.settings())

    def save_pretrained(
        self, folder: str | Path, card: Card | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write the folder that :meth:`from_pretrained` reads: config.json and model.safetensors.

        The folder appears complete or not at all; an existing checkpoint is replaced. With a card, it is one
        to be published: README.md, a picture of samples and the evaluation record stand beside the weights,
        and of paths on this machine only the last part.

        Args:
            folder: where to write it.
            card: what the model card says.
            dtype: of the weights in the file; None leaves them as they are. fp16 is read as fp32 again.

        Raises:
            InputError: the folder holds something else, or cannot be written, or the card's record is none.
        """
        config, files = self.settings(), {}
        if card is not None:
            config = public_config(config)
            files = self._card_files(card, config, dtype)
        weights = {name: value.to(dtype or value.dtype) for name, value in self.state_dict().items()}
        checkpoint.save(Path(folder), config, weights, card=files)

    def _card_files(self, card: Card, config: RunConfig, dtype: torch.dtype | None) -> dict[str, bytes]:
        """README.md, samples.png and evaluation.json, as far as there are any."""
        record, rounded, files = None, False, {}
        if card.record is not None:
            record = public(read_record(card.record))
            rounded = self._measured_before_rounding(record, dtype, card.record)
            files["evaluation.json"] = json.dumps(record, indent=2).encode() + b"\n"
        if card.columns and not config.codec.vae:  # latents would need their VAE
            files["samples.png"] = self._picture(card.columns, card.guidance)
        text = card_text(card, config, record, picture="samples.png" in files, rounded=rounded)
        return {"README.md": text.encode(), **files}

    def _measured_before_rounding(
        self, record: dict[str, Any], dtype: torch.dtype | None, file: Path | str
    ) -> bool:
        """Whether a record is of the weights before their rounding to ``dtype``; of others it is refused."""
        measured = record["settings"].get("weights_sha256")
        stored = copy.deepcopy(self).to(dtype).to(self.data_dtype) if dtype else self
        if measured in (None, weights_hash(stored)):
            return False
        if measured == weights_hash(self):
            return True
        raise InputError(f"{file} is the record of other weights; evaluate these, or give theirs.")

    def _picture(self, columns: int, guidance: float) -> bytes:
        """A PNG of ``columns`` samples of each class, of the first ten if there are more."""
        count = min(self.config.num_classes or 0, _PICTURED)
        labels = [label for label in range(count) for _ in range(columns)] or None
        images = self.sample(
            labels, range(columns * (count or columns)), guidance=guidance if labels else 0.0
        )
        with tempfile.TemporaryDirectory() as folder:
            save_grid(images, Path(folder, "grid.png"), columns, names=self.classes[:count])
            return Path(folder, "grid.png").read_bytes()

    def push_to_hub(
        self,
        name: str,
        card: Card | None = None,
        dtype: torch.dtype | None = None,
        *,
        private: bool = False,
        revision: str | None = None,
    ) -> str:
        """Upload the folder of :meth:`save_pretrained` to the Hugging Face Hub; returns its address.

        The token is the one of ``hf auth login`` or of HF_TOKEN.

        Args:
            name: ``owner/name``; the repository is made if there is none.
            card: what the model card says; None: what the settings say.
            dtype: of the weights in the file; None leaves them as they are.
            private: whether a new repository is private.
            revision: an existing branch; None is the main one.

        Raises:
            InputError: the Hub does not answer, does not know the user or refuses.
        """
        if not hub.REPOSITORY.fullmatch(name) or "@" in name:
            raise InputError(f"{name} is no name on the Hub; give owner/name.")
        hub.check_login()
        with tempfile.TemporaryDirectory() as place:
            self.save_pretrained(Path(place, "flow"), card or Card(name), dtype)
            return hub.upload(Path(place, "flow"), name, private=private, revision=revision)


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
        self.set_names(classes)

    def settings(self) -> RunConfig:
        """Its settings as a checkpoint holds them."""
        return replace(super().settings(), student=self.student)

    @property
    def about(self) -> str:
        """What the student is, in one sentence."""
        count = sum(p.numel() for p in self.parameters())
        return f"a student of method {self.student.method}, {count:,} parameters, of {self.student.teacher}"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that :meth:`from_pretrained` reads: config.json and model.safetensors.

        Raises:
            InputError: the folder holds something else, or cannot be written.
        """
        checkpoint.save(Path(folder), self.settings(), self.state_dict())

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
        student.take(folder, config, weights)
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
