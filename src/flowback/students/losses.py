"""What students learn from a frozen flow: its inverse at once, or a velocity from its noise to images.

The teacher encodes noised images x⁰ to the states x¹ … xᵀ = z in one parallel pass; nothing is decoded.

inverse (BiFlow, arXiv 2512.10953): hᵢ are the tokens after stage i, φᵢ its head, g the network's output, all
in units of each state's root mean square rₜ, and clipped to ±c (norm control):

    L = |g(z) − x|² / r₀² + λ · mean over i = 1 … T of |φᵢ(hᵢ) − clip(x^(T−i) / r_(T−i))|²

x is the clean image. Guidance by scale w is folded in: each target y becomes y + w · (y − ỹ), with ỹ the
student's own output for the same z without label and guidance.

matching (NFM, arXiv 2603.09014): z is brought to unit variance, t is logit-normal(−0.2, 1),

    L = |v((1 − t)·x + t·z / r_T, t) − (z / r_T − x)|²

With ``coupling="independent"`` z / r_T is drawn instead: plain flow matching.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.students.network import StudentNetwork

__all__ = [
    "TIME_MEAN",
    "TIME_STD",
    "encode_states",
    "inverse_losses",
    "matching_losses",
    "state_rms",
    "times",
]

TIME_MEAN, TIME_STD = -0.2, 1.0
"""Of the logit of the time in training, normally distributed."""


@torch.no_grad()
def encode_states(
    teacher: TARFlow,
    noised: Float[Tensor, "b c h w"],
    labels: Labels,
    drop: Bool[Tensor, " b"] | None = None,
) -> list[Float[Tensor, "b n d"]]:
    """The teacher's states x⁰ … xᵀ of noised images, tokens in raster order.

    The images of a teacher with a range of noise levels have the highest, which it draws at.
    """
    x = teacher.tokens(noised)
    highest = teacher.config.noise_max if teacher.config.noise == "range" else None
    levels = teacher.levels(highest, len(x))
    return [x, *(output.z for output in teacher.encode_blocks(x, labels, drop, levels=levels))]


def state_rms(states: list[Float[Tensor, "b n d"]]) -> tuple[float, ...]:
    """Root mean square of each state, to four digits: the same wherever it is measured."""
    return tuple(float(f"{x.double().square().mean().sqrt():.4g}") for x in states)


def times(chance: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Times of training from numbers uniform on [0, 1)."""
    safe = chance.double().clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid(TIME_MEAN + TIME_STD * torch.special.ndtri(safe)).to(chance.dtype)


def inverse_losses(
    student: StudentNetwork,
    states: list[Float[Tensor, "b n d"]],
    clean: Float[Tensor, "b n d"],
    labels: Labels,
    drop: Bool[Tensor, " b"] | None,
    chance: Float[Tensor, " b"],
) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, "b n d"]]:
    """The losses of hidden alignment, and the predicted clean images.

    Args:
        student: the network.
        states: the teacher's x⁰ … xᵀ.
        clean: tokens of the images without noise.
        labels: those of the teacher's pass.
        drop: likewise.
        chance: uniform on [0, 1): decides the guidance scales; half of the images have none.

    Returns:
        ``image``, and ``hidden_i`` of each stage; means over the batch.
    """
    config, rms = student.student, student.student.rms
    targets = [(x / r).clamp(-config.clip, config.clip) for x, r in zip(states, rms, strict=True)]
    z, targets = states[-1], [clean / rms[0], *targets[-2::-1]]
    number = None
    if config.guidance:
        number = (2 * chance - 1).clamp(min=0)
        if drop is not None:
            number = torch.where(drop, 0, number)
        with torch.no_grad():
            own = _outputs(student, z, None, None, None)
        scale = (config.guidance * number)[:, None, None]
        targets = [y + scale * (y - without) for y, without in zip(targets, own, strict=True)]
    outputs = _outputs(student, z, labels, drop, number)
    errors = [(out - y).square().mean() for out, y in zip(outputs, targets, strict=True)]
    named = {f"hidden_{i}": error for i, error in enumerate(errors[1:], start=1)}
    return {"image": errors[0], **named}, outputs[0] * rms[0]


def _outputs(
    student: StudentNetwork, z: Tensor, labels: Labels, drop: Tensor | None, number: Tensor | None
) -> list[Tensor]:
    """Image, then states x^(T-1) ... x^0, in units of their root mean squares."""
    image, hidden = student(z, labels, drop, number)
    return [image / student.student.rms[0], *student.states(hidden)]


def matching_losses(
    student: StudentNetwork,
    z: Float[Tensor, "b n d"],
    clean: Float[Tensor, "b n d"],
    labels: Labels,
    drop: Bool[Tensor, " b"] | None,
    chance: Float[Tensor, " b"],
) -> dict[str, Float[Tensor, ""]]:
    """The loss of flow matching between images and noise ``z`` of unit variance; ``velocity``."""
    t = times(chance)
    at = t[:, None, None]
    velocity, _ = student((1 - at) * clean + at * z, labels, drop, t)
    return {"velocity": (velocity - (z - clean)).square().mean()}
