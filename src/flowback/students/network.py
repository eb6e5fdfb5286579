"""The one network of all students: stages of a Transformer over all tokens, from noise to images.

It is built as the flow's blocks are, without the causal mask, since nothing has to be inverted. A number c in
[0, 1] is its second input: the time of ``matching``, the guidance scale of ``inverse`` in units of the
largest one. Position is added before the first stage; class and c before each stage.

Letters in shapes: b images, n tokens, d values of a token, w width, k classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from flowback.config import ModelConfig, StudentConfig
from flowback.flow.block import Labels
from flowback.flow.image_model import ImageModel
from flowback.nn.attention import Rotary, rotary_table
from flowback.nn.transformer import Transformer

__all__ = ["Stage", "StudentNetwork", "number_features"]


def number_features(value: Float[Tensor, " b"], width: int) -> Float[Tensor, "b w"]:
    """Sines and cosines of a number in [0, 1], of 1/2 to 500 turns, evenly in their logs."""
    count = width // 2
    steps = torch.arange(count, dtype=torch.float64, device=value.device) / max(count - 1, 1)
    turns = 0.5 * 1000.0**steps
    angle = 2 * math.pi * value.double()[:, None] * turns
    features = torch.cat([angle.sin(), angle.cos()], dim=1).to(value.dtype)
    return F.pad(features, (0, width - 2 * count))


class Stage(nn.Module):
    """A Transformer over all tokens, and what it adds to them first."""

    class_table: nn.Parameter | None

    def __init__(self, config: ModelConfig, width: int, layers: int) -> None:
        super().__init__()
        if config.num_classes:
            self.class_table = nn.Parameter(0.01 * torch.randn(config.num_classes, width))
        else:
            self.register_parameter("class_table", None)
        self.number = nn.Linear(width, width)
        self.body = Transformer(
            width, layers, config.head_dim, config.mlp, config.mlp_ratio, config.qk_norm, causal=False
        )

    def context(
        self, labels: Labels, drop: Bool[Tensor, " b"] | None, number: Float[Tensor, "b w"]
    ) -> Float[Tensor, "b w"]:
        """What is added to every token of an image."""
        context: Tensor = self.number(number)
        if self.class_table is None:
            return context
        return context + self._class(self.class_table, labels, drop)

    def forward(
        self, h: Float[Tensor, "b n w"], context: Float[Tensor, "b w"], rotary: Rotary | None
    ) -> Float[Tensor, "b n w"]:
        """The tokens after this stage."""
        return self.body(h + context[:, None], rotary)[0]

    def _class(self, table: Tensor, labels: Labels, drop: Tensor | None) -> Float[Tensor, "#b w"]:
        """As in the flow: without a label, the mean of the table."""
        if labels is None:
            return table.mean(0, keepdim=True)
        chosen = labels @ table if labels.is_floating_point() else F.embedding(labels, table)
        return chosen if drop is None else torch.where(drop[:, None], table.mean(0), chosen)


class StudentNetwork(ImageModel):
    """Noise to images, in T + 1 stages for a teacher of T blocks.

    Args:
        config: the teacher's model: images, tokens and classes.
        student: the student's own settings.
    """

    position: nn.Parameter | None
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig, student: StudentConfig) -> None:
        super().__init__(config)
        self.student = student
        width = student.width or config.width
        self.proj_in = nn.Linear(config.token_dim, width)
        if config.position == "learned":
            self.position = nn.Parameter(0.01 * torch.randn(config.tokens, width))
        else:
            self.register_parameter("position", None)
            rotary = rotary_table(config.grid, config.head_dim)
            self.register_buffer("rotary_cos", rotary.cos, persistent=False)
            self.register_buffer("rotary_sin", rotary.sin, persistent=False)
        self.number = nn.Linear(width, width)
        stages = nn.ModuleList(Stage(config, width, student.layers) for _ in range(config.blocks + 1))
        self.stages = cast("list[Stage]", stages)
        # Of stage i, what the teacher's state x^(T-i) would be; drawing an image needs none of them.
        heads = config.blocks if student.method == "inverse" else 0
        self.heads = nn.ModuleList(nn.Linear(width, config.token_dim) for _ in range(heads))
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, config.token_dim)

    @property
    def bodies(self) -> list[Transformer]:
        """The Transformers of the stages."""
        return [stage.body for stage in self.stages]

    @property
    def rotary(self) -> Rotary | None:
        """Position code of the tokens, where it is not learned."""
        return Rotary(self.rotary_cos, self.rotary_sin) if self.position is None else None

    def contexts(
        self,
        like: Float[Tensor, "b n d"],
        labels: Labels,
        drop: Bool[Tensor, " b"] | None,
        number: Float[Tensor, " b"] | None,
    ) -> list[Float[Tensor, "b w"]]:
        """What is added to every token of an image before each stage, in the dtype of the tokens ``like``."""
        value = like.new_zeros(len(like)) if number is None else number.to(like.dtype)
        features = number_features(value, self.proj_in.out_features).to(value.dtype)
        embedded = F.silu(self.number(features))
        return [stage.context(labels, drop, embedded) for stage in self.stages]

    def forward(
        self,
        z: Float[Tensor, "b n d"],
        labels: Labels = None,
        drop: Bool[Tensor, " b"] | None = None,
        number: Float[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], list[Float[Tensor, "b n w"]]]:
        """The output's tokens, and the tokens after each stage but the last.

        Args:
            z: noise, or a point on the way from images to noise.
            labels: class ids, soft class weights, or None for unconditional.
            drop: True where an image's label is left out.
            number: time, or guidance scale over the largest one; None is 0.
        """
        h = self.proj_in(z.to(self.dtype))
        if self.position is not None:
            h = h + self.position
        states = []
        for stage, context in zip(self.stages, self.contexts(h, labels, drop, number), strict=True):
            h = stage(h, context, self.rotary)
            states.append(h)
        # As in the flow, what becomes an image is at least fp32, whatever the dtype of autocast or weights.
        with torch.autocast(h.device.type, enabled=False):
            dtype = self.data_dtype
            normed = F.layer_norm(
                h.to(dtype), h.shape[-1:], self.norm.weight.to(dtype), self.norm.bias.to(dtype)
            )
            out = F.linear(normed, self.proj_out.weight.to(dtype), self.proj_out.bias.to(dtype))
        return out, states[:-1]

    def states(self, hidden: list[Float[Tensor, "b n w"]]) -> list[Float[Tensor, "b n d"]]:
        """The teacher's states x^(T-1) ... x^0 as the heads read them from the tokens after each stage."""
        with torch.autocast(hidden[0].device.type, enabled=False):
            return [
                F.linear(
                    h.to(self.data_dtype), head.weight.to(self.data_dtype), head.bias.to(self.data_dtype)
                )
                for head, h in zip(cast("Iterable[nn.Linear]", self.heads), hidden, strict=True)
            ]

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of one evaluation of one image; a multiply-add counts two."""
        n, width = self.config.tokens, self.proj_in.out_features
        matrices = sum(p.numel() for body in self.bodies for p in body.parameters() if p.ndim == 2)
        ends = 2 * self.config.token_dim * width
        attention = 4 * width * n * n * sum(len(body.layers) for body in self.bodies)
        return 2 * n * (matrices + ends) + attention
