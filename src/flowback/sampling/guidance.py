"""Guidance: the predictions with the label, pushed away from those without it.

TARFlow (arXiv 2412.06329, Eq. 8), on shift and log-scale alike, c with and u without the label:

    c + w · (c − u)

STARFlow (arXiv 2506.06276), on the Gaussian N(μ, σ²) that a block predicts for a token:

    s = min(σc/σu, 1)²    σ² = σc² / (1 + w − w·s)    μ = ((1 + w)·μc − w·s·μu) / (1 + w − w·s)

A temperature τ divides the attention logits of the stream without label; with τ ≠ 1 that stream is worse
even where there are no labels, which gives guidance for unconditional models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.checked import require_one_of
from flowback.errors import InputError
from flowback.task_config import SampleConfig

__all__ = ["Guidance", "ImageGuide", "Prediction", "starflow", "tarflow"]

Formula = Literal["tarflow", "starflow"]

Prediction = tuple[Tensor, Tensor]
"""Shift and log-scale, (b, n, d) each."""


@dataclass(frozen=True)
class ImageGuide:
    """A block's :class:`~flowback.flow.block.Guide` that can be asked about some images of the batch."""

    weights: Float[Tensor, "b n"]
    """w of each token, in the block's order."""
    join: Callable[[Prediction, Prediction, Tensor], Prediction]
    """The formula."""

    @property
    def linear(self) -> bool:
        """Whether shift and log-scale are joined alike, by c + w · (c − u)."""
        return self.join is tarflow

    def __call__(
        self,
        shift: Float[Tensor, "b2 n d"],
        log_scale: Float[Tensor, "b2 n d"],
        start: int,
        images: Int[Tensor, " b"] | None = None,
    ) -> Prediction:
        """``images``: which ones the predictions are of; None is all."""
        w = self.weights[:, start : start + shift.shape[1], None]
        if images is not None:
            w = w[images]
        (shift_c, shift_u), (log_c, log_u) = shift.chunk(2), log_scale.chunk(2)
        return self.join((shift_c, log_c), (shift_u, log_u), w)


@dataclass(frozen=True)
class Guidance:
    """How strongly, with which formula and where to guide."""

    scale: float | Sequence[float] | Float[Tensor, " b"] = 0.0
    """w; 0 is off. A sequence gives each image its own."""
    ramp: bool = False
    """Let w grow over the tokens in each block's order, from 0 at the first to w at the last."""
    formula: Formula = "tarflow"
    """How the two predictions are joined."""
    temperature: float = 1.0
    """Temperature of the attention logits of the stream without label."""
    blocks: int | None = None
    """Guide only this many blocks, those nearest the noise; None guides all."""

    def __post_init__(self) -> None:
        require_one_of(self.formula, Formula, "guidance formula")
        if self.temperature <= 0:
            raise InputError(f"The attention temperature is {self.temperature}; it must be above 0.")
        if self.blocks is not None and self.blocks < 0:
            raise InputError(f"The number of guided blocks is {self.blocks}; it must not be negative.")
        if not torch.isfinite(torch.as_tensor(self.scale)).all():
            raise InputError(f"The guidance scale is {self.scale}; it must be a finite number, 0 for none.")
        if self.formula == "starflow" and bool(torch.as_tensor(self.scale).lt(-1).any()):
            raise InputError(
                f"The guidance scale is {self.scale}; with STARFlow's formula it must be at least -1, "
                "below which there is no such Gaussian."
            )

    @classmethod
    def from_config(cls, config: SampleConfig) -> Guidance:
        """The guidance that the options of sampling describe."""
        return cls(
            config.guidance, config.ramp, config.formula, config.attention_temperature, config.guided_blocks
        )

    @property
    def active(self) -> bool:
        """Whether there is anything to guide."""
        return self.blocks != 0 and bool(torch.as_tensor(self.scale).ne(0).any())

    def check(self, labelled: bool) -> None:
        """Refuse guidance that would have no effect, before work starts.

        Raises:
            InputError: there is something to guide, but neither labels nor an attention temperature.
        """
        if self.active and not labelled and self.temperature == 1:
            raise InputError(
                "Guidance without labels does nothing: give labels, or an attention temperature other than 1 "
                "(--attention-temperature 1.5, say)."
            )

    def scales(self, batch: int, like: Tensor) -> Float[Tensor, " b"]:
        """One scale for each image.

        Raises:
            InputError: a number of scales that is neither 1 nor ``batch``.
        """
        values = torch.as_tensor(self.scale, dtype=like.dtype, device=like.device)
        if values.ndim == 0:
            return values.expand(batch)
        if values.shape != (batch,):
            raise InputError(
                f"{values.numel()} guidance scales for {batch} images; give one, or one per image."
            )
        return values

    def covers(self, block: int, total: int) -> bool:
        """Whether this block, counted from 1 at the data, is guided."""
        return self.active and block > total - (total if self.blocks is None else self.blocks)

    def guide(self, scales: Float[Tensor, " b"], tokens: int) -> ImageGuide:
        """The function that joins stacked predictions of a block with this many tokens."""
        ramp = torch.arange(tokens, dtype=scales.dtype, device=scales.device) / max(tokens - 1, 1)
        weights = scales[:, None] * (ramp if self.ramp else torch.ones_like(ramp))
        return ImageGuide(weights, starflow if self.formula == "starflow" else tarflow)


def tarflow(c: Prediction, u: Prediction, w: Float[Tensor, "b n 1"]) -> Prediction:
    """Shift and log-scale alike: c + w · (c − u)."""
    beyond = 1 + w  # u + (1 + w) · (c − u)
    return torch.lerp(u[0], c[0], beyond), torch.lerp(u[1], c[1], beyond)


def starflow(c: Prediction, u: Prediction, w: Float[Tensor, "b n 1"]) -> Prediction:
    """Mean and spread of the sharpened Gaussian."""
    s = (2 * (c[1] - u[1])).clamp(max=0).exp()
    total = 1 + w - w * s
    return ((1 + w) * c[0] - w * s * u[0]) / total, c[1] - 0.5 * total.log()
