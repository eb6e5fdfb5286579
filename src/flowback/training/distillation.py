"""What a run trains, a student: its losses against a frozen teacher, which only encodes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowback.alignment.align import Noised
from flowback.alignment.encoders import Encoder, create_encoder
from flowback.config import RunConfig
from flowback.flow.block import Labels
from flowback.flow.cost import flops_per_image
from flowback.model import Flow, Student, load_teacher
from flowback.nn.transformer import Transformer
from flowback.students.losses import encode_states, inverse_losses, matching_losses

__all__ = ["StudentLosses", "StudentObjective"]


class StudentLosses(NamedTuple):
    """Means over the images of a batch."""

    loss: Float[Tensor, ""]
    """What is differentiated."""
    parts: dict[str, Float[Tensor, ""]]
    """The terms, without their weights; without a graph."""

    @property
    def figures(self) -> dict[str, Float[Tensor, ""]]:
        """What a run records, by name."""
        return {"loss": self.loss.detach(), **self.parts}


class _Frozen:
    """Models that help an objective and are no part of it: not trained, stored, copied or shared out."""

    def __init__(self, teacher: Flow, encoder: Encoder | None) -> None:
        self.teacher, self.encoder = teacher.requires_grad_(False), encoder

    def __deepcopy__(self, memo: object) -> _Frozen:
        return self

    def to(self, device: torch.device) -> _Frozen:
        """Follow the data."""
        self.teacher.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self


class StudentObjective(nn.Module):
    """A student as a module whose call gives the losses of a batch; its teacher is read from its checkpoint.

    Args:
        config: the run; its model is the teacher's.

    Raises:
        InputError: there is no such teacher, or its weights are others than the run began with.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Student(config.model, config.student, config.classes)
        features = config.student.features
        self._frozen = _Frozen(
            load_teacher(config.student), None if features is None else create_encoder(features)
        )

    @property
    def trained(self) -> Student:
        """What is averaged, kept and used later."""
        return self.student

    @property
    def bodies(self) -> list[Transformer]:
        """The Transformers, from the noise on."""
        return self.student.bodies

    @property
    def gathered_alone(self) -> list[Transformer]:
        """Of a sharded run, the bodies that are whole only while they run."""
        return self.bodies

    @property
    def parameter_counts(self) -> dict[str, int]:
        """Number of weights, by what they are in."""
        return {"in the student": sum(p.numel() for p in self.student.parameters())}

    @property
    def step_flops(self) -> int:
        """Floating-point operations of one step of the whole batch; the teacher goes forward only."""
        one_pass = flops_per_image(self.config.model)
        return self.config.train.batch_size * (3 * self.student.flops_per_image + one_pass)

    @torch.no_grad()
    def statistics(self, batch: Noised) -> dict[str, float]:
        """Mean square of the tokens after each stage, for the teacher's noise of a batch: ``h2_i``."""
        teacher = self._frozen.to(batch.images.device).teacher
        z = encode_states(teacher, batch.images, batch.labels)[-1]
        _, hidden = self.student(z, batch.labels)
        return {f"h2_{i}": float(h.square().mean()) for i, h in enumerate(hidden, start=1)}

    def forward(
        self,
        noised: Float[Tensor, "b c h w"],
        labels: Labels,
        drop: Bool[Tensor, " b"] | None,
        clean: Float[Tensor, "b c h w"],
        chance: Float[Tensor, " b"],
        noise: Float[Tensor, "b c h w"] | None = None,
    ) -> StudentLosses:
        """Losses of images.

        Args:
            noised: with the teacher's training noise, on [-1, 1].
            labels: ids or class weights; None is unconditional.
            drop: True where an image's label is left out, for teacher and student.
            clean: the images without noise.
            chance: uniform on [0, 1): decides guidance scales, or times.
            noise: normal; in place of the teacher's z.
        """
        config, bf16 = self.config.student, self.config.train.precision == "bf16"
        frozen, tokens = self._frozen.to(noised.device), self.student.tokens(clean)
        with torch.autocast(noised.device.type, torch.bfloat16, enabled=bf16):
            if config.method == "matching":
                if noise is None:
                    z = encode_states(frozen.teacher, noised, labels, drop)[-1] / config.rms[-1]
                else:
                    z = self.student.tokens(noise)
                parts = matching_losses(self.student, z, tokens, labels, drop, chance)
                loss = parts["velocity"]
            else:
                states = encode_states(frozen.teacher, noised, labels, drop)
                parts, predicted = inverse_losses(self.student, states, tokens, labels, drop, chance)
                hidden = torch.stack([value for name, value in parts.items() if name != "image"])
                loss = parts["image"] + config.hidden_weight * hidden.mean()
        if frozen.encoder is not None:
            parts["features"] = _feature_loss(frozen.encoder, self.student.images(predicted), clean)
            loss = loss + config.feature_weight * parts["features"]
        return StudentLosses(loss, {name: value.detach() for name, value in parts.items()})


def _feature_loss(
    encoder: Encoder, predicted: Float[Tensor, "b c h w"], clean: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """Mean squared difference of patch features, in units of those of the clean images."""
    grid = max(1, clean.shape[-1] // 4)
    with torch.no_grad():
        right = encoder.feature_map(clean.float(), encoder.input_size(grid))
    found = encoder.feature_map(predicted.float(), encoder.input_size(grid))
    return (found - right).square().mean() / right.square().mean()
