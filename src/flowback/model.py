"""The public flow: TARFlow's density, with class names, files and sampling."""

from __future__ import annotations

import copy
import json
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Bool, Float
from torch import Tensor

from flowback import checkpoint, hub
from flowback.config import DataConfig, ModelConfig, RunConfig
from flowback.data.load import UNNAMED
from flowback.devices import pick_device
from flowback.errors import InputError, nearest
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.cost import parameters
from flowback.flow.levels import UserLevels
from flowback.flow.likelihood import add_noise
from flowback.flow.tarflow import UserLabels
from flowback.model_card import Card, about, card_text, public, public_config, read_record
from flowback.presets import get_preset
from flowback.sampling import Inpainted, Sampler, inpaint, interpolate, sample
from flowback.sampling.block_plan import weights_hash
from flowback.sampling.image_files import save_grid

__all__ = ["Flow", "create_flow", "load"]

_PICTURED = 10
"""Most classes in the picture of a model card."""
_SHOWN = 20
"""Classes that a message names."""


class Flow(TARFlow):
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
        self.classes = tuple(classes)
        """Names of the classes; empty if unconditional or unknown."""
        self.run: RunConfig | None = None
        """All settings of the run that trained it; None for a new flow."""
        self.folder: Path | None = None
        """Checkpoint folder that its weights were read from; None for a new flow."""
        if self.classes and len(self.classes) != (config.num_classes or 0):
            raise InputError(
                f"{len(self.classes)} class names for a model of {config.num_classes or 0} classes; "
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
            labels = [self.class_id(label) if isinstance(label, str) else label for label in labels]
        return super().labels(labels, batch)

    def class_id(self, name: str) -> int:
        """The id of a class by its name; letters with accents match however they are composed.

        Raises:
            InputError: no class of this name, or several.
        """
        ids = [number for number, own in enumerate(self.classes) if own == name]
        ids = ids or [number for number, own in enumerate(self.classes) if _composed(own) == _composed(name)]
        if len(ids) > 1:
            raise InputError(f"The model has {len(ids)} classes called {name}; give an id.")
        if ids:
            return ids[0]
        if not self.classes:
            raise InputError(f"The model does not know the names of its classes; give {name!r} as an id.")
        close = nearest(name, self.classes, only_close=True)
        known = ", ".join(f"{number} = {own}" for number, own in enumerate(self.classes[:_SHOWN]))
        more = ", ..." if len(self.classes) > _SHOWN else ""
        raise InputError(f"The model has no class {name!r}{close or f'; known: {known}{more}'}")

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
        held, needed = sum(value.numel() for value in weights.values()), parameters(config.model)
        if held != needed:  # before a model of any size is built
            raise InputError(
                f"The weights in {folder} do not fit its config.json: they are {held:,} numbers, "
                f"and its model takes {needed:,}."
            )
        with init_empty_weights(include_buffers=False):  # the weights are about to come
            flow = cls(config.model, config.classes)
        try:
            flow.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"The weights in {folder} do not fit its config.json: {reason}") from None
        flow.run, flow.folder = config, folder
        return flow.to(device).eval()

    @property
    def about(self) -> str:
        """What the flow is, in one sentence: its size, images, data and training."""
        return about(self._run())

    def _run(self) -> RunConfig:
        """Its settings as a checkpoint holds them."""
        run = self.run or RunConfig(data=DataConfig(UNNAMED))
        return RunConfig(self.config, run.data, run.alignment, run.train, run.codec, self.classes)

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
        config, files = self._run(), {}
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


def _composed(name: str) -> str:
    """macOS writes an accent as a sign of its own, keyboards do not."""
    return unicodedata.normalize("NFC", name)


def load(name: str | Path, device: torch.device | str = "cpu", ema: float | None = None) -> Flow:
    """Load a model from a folder or the Hugging Face Hub; see :meth:`Flow.from_pretrained`."""
    return Flow.from_pretrained(name, device, ema)


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
