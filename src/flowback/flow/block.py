"""One autoregressive block: the parallel forward pass, and the decode step of the inverse.

Tokens come and go in raster order; a flipped block reads them backwards inside. Predictions for a token
depend on the tokens before it in the block's own order, and the first token passes unchanged.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flowback.config import ModelConfig
from flowback.flow import affine
from flowback.nn.attention import KVCache, Rotary, rotary_table
from flowback.nn.level_embedding import LevelEmbedding
from flowback.nn.transformer import Transformer

__all__ = ["Block", "BlockOutput", "Guide", "Labels", "Prediction"]

Labels = Int[Tensor, " b"] | Float[Tensor, "b k"] | None
"""Class ids, soft class weights that sum to 1, or None for unconditional."""


class Prediction(NamedTuple):
    """What a block predicts from the tokens, in raster order."""

    shift: Float[Tensor, "b n d"]
    log_scale: Float[Tensor, "b n d"]
    hidden: dict[int, Float[Tensor, "b n w"]]
    """Outputs of the chosen layers, counted from 1."""


class BlockOutput(NamedTuple):
    """Result of a block's forward pass."""

    z: Float[Tensor, "b n d"]
    log_det: Float[Tensor, " b"]
    """log|det dz/dx| in nats, summed over dimensions."""
    prediction: Prediction
    """What the block predicted from the tokens."""

    @property
    def hidden(self) -> dict[int, Float[Tensor, "b n w"]]:
        """Outputs of the chosen layers, counted from 1."""
        return self.prediction.hidden


@runtime_checkable
class Guide(Protocol):
    """Joins conditional and unconditional predictions, stacked as 2B rows, into B guided ones."""

    def __call__(
        self, shift: Float[Tensor, "b2 n d"], log_scale: Float[Tensor, "b2 n d"], start: int
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        """``start`` is the index of the first predicted token, in the block's order."""
        ...


class Block(nn.Module):
    """A block of TARFlow (arXiv 2412.06329, Sec. 2.2).

    Args:
        config: the model.
        layers: of this block's Transformer.
        flip: read the tokens in reversed raster order.
    """

    position: nn.Parameter | None
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig, layers: int, flip: bool) -> None:
        super().__init__()
        self.flip, self.log_scale_bound = flip, config.log_scale_bound
        self.proj_in = nn.Linear(config.token_dim, config.width)
        self.body = Transformer(
            config.width, layers, config.head_dim, config.mlp, config.mlp_ratio, config.qk_norm
        )
        self.proj_out = nn.Linear(config.width, 2 * config.token_dim)
        nn.init.zeros_(self.proj_out.weight)
        if config.position == "learned":
            self.position = nn.Parameter(0.01 * torch.randn(config.tokens, config.width))
        else:
            self.register_parameter("position", None)
            rotary = rotary_table(config.grid, config.head_dim)
            self.register_buffer("rotary_cos", self.reorder(rotary.cos, dim=0), persistent=False)
            self.register_buffer("rotary_sin", self.reorder(rotary.sin, dim=0), persistent=False)
        self.class_table: nn.Parameter | None
        if config.num_classes:
            self.class_table = nn.Parameter(0.01 * torch.randn(config.num_classes, config.width))
        else:
            self.register_parameter("class_table", None)
        self.level_embedding = LevelEmbedding(config.width) if config.noise == "range" else None

    def reorder(self, x: Tensor, dim: int = 1) -> Tensor:
        """Raster order to the block's own order, and back: the map is its own inverse."""
        return x.flip(dim) if self.flip else x

    def context(
        self, labels: Labels, drop: Tensor | None = None, levels: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "#b w"] | None:
        """The embedding added to every token of an image; None for a model without classes and noise levels.

        Unconditional (None, or a True in ``drop``) is the mean of the class table in every direction. The
        noise ``levels`` are needed by a flow with a range of them, and by no other.
        """
        told = self._class_embedding(labels, drop)
        if self.level_embedding is None:
            return told
        assert levels is not None
        level = self.level_embedding(levels)
        return level if told is None else told + level

    def _class_embedding(self, labels: Labels, drop: Tensor | None) -> Float[Tensor, "#b w"] | None:
        table = self.class_table
        if table is None:
            return None
        if labels is None:
            return table.mean(0, keepdim=True)
        chosen = labels @ table if labels.is_floating_point() else F.embedding(labels, table)
        if drop is not None:
            chosen = torch.where(drop[:, None], table.mean(0), chosen)
        return chosen

    def _positions(self, start: int | Tensor, count: int) -> tuple[Tensor | None, Rotary | None]:
        """Position code of ``count`` tokens of the block's order, from ``start`` on."""
        place = start if isinstance(start, Tensor) else slice(start, start + count)
        if self.position is None:
            return None, Rotary(self.rotary_cos[place], self.rotary_sin[place])
        return self.reorder(self.position, dim=0)[place], None

    def _following(
        self,
        x: Float[Tensor, "b n d"],
        context: Tensor | None,
        cache: KVCache | None = None,
        start: int | Tensor = 0,
        temperature: float | Tensor = 1.0,
        hidden: Collection[int] = (),
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Predictions that follow each given token; everything in the block's own order."""
        h = self.proj_in(x.to(self.proj_in.weight.dtype))
        position, rotary = self._positions(start, x.shape[1])
        if position is not None:
            h = h + position
        if context is not None:
            h = h + context[:, None]
        h, states = self.body(h, rotary, cache, start, temperature, hidden)
        # Shift, log-scale and all that follows are at least fp32, whatever the dtype of autocast or weights.
        with torch.autocast(h.device.type, enabled=False):
            weight, bias = self.proj_out.weight, self.proj_out.bias
            dtype = torch.promote_types(weight.dtype, torch.float32)
            log_scale, shift = F.linear(h.to(dtype), weight.to(dtype), bias.to(dtype)).chunk(2, dim=-1)
            log_scale = affine.bounded(log_scale, self.log_scale_bound)
        return shift, log_scale, states

    def predict(
        self, x: Float[Tensor, "b n d"], context: Tensor | None, hidden: Collection[int] = ()
    ) -> Prediction:
        """Shift and log-scale of every token from the tokens before it, in one parallel pass."""
        shift, log_scale, states = self._following(self.reorder(x), context, hidden=hidden)
        # The output at a token predicts the next one; the first token has no context: zeros.
        shift, log_scale = (F.pad(y[:, :-1], (0, 0, 1, 0)) for y in (shift, log_scale))
        return Prediction(
            self.reorder(shift),
            self.reorder(log_scale),
            {layer: self.reorder(state) for layer, state in states.items()},
        )

    def forward(
        self, x: Float[Tensor, "b n d"], context: Tensor | None, hidden: Collection[int] = ()
    ) -> BlockOutput:
        """Data to noise: z = (x - shift) * exp(-log_scale)."""
        predicted = self.predict(x, context, hidden)
        z = affine.forward(x, predicted.shift, predicted.log_scale)
        return BlockOutput(z, affine.log_det(predicted.log_scale), predicted)

    def step(
        self,
        x: Float[Tensor, "b n d"],
        context: Float[Tensor, "#b w"] | None,
        cache: KVCache,
        start: int | Tensor = 0,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        """Decode step: shift and log-scale of the tokens that follow those in ``x``.

        All in the block's own order.

        Args:
            x: tokens start ... start + n - 1 of the block's order.
            context: from :meth:`context`.
            cache: keys and values of the tokens before ``start``; those of ``x`` are written into it.
            start: place of the first token; for a single token it may be a tensor of one element, which is
                read on the device only.
            temperature: divides the attention logits; a tensor (b, 1, 1, 1) sets it per row.
        """
        shift, log_scale, _ = self._following(x, context, cache, start, temperature)
        return shift, log_scale

    @torch.no_grad()
    def inverse(
        self,
        z: Float[Tensor, "b n d"],
        context: Tensor | None,
        guide: Guide | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Float[Tensor, "b n d"]:
        """Noise to data, one token after another, with cached keys and values.

        Args:
            z: output of :meth:`forward`.
            context: as given to :meth:`forward`; with a guide, the rows of 2B images (conditional, then
                unconditional), which run as one batch.
            guide: joins the two predictions.
            temperature: of the attention logits; a tensor (2B, 1, 1, 1) sets it per row.
        """
        z = self.reorder(z)
        b, n, _ = z.shape
        rows = 2 * b if guide else b
        cache = self.body.empty_cache(rows, n, like=self.proj_in.weight)
        x = torch.empty_like(z)
        x[:, 0] = z[:, 0]
        for i in range(n - 1):
            last = x[:, i : i + 1]
            rows_of_last = last.repeat(2, 1, 1) if guide else last
            shift, log_scale = self.step(rows_of_last, context, cache, i, temperature)
            if guide:
                shift, log_scale = guide(shift, log_scale, i + 1)
            x[:, i + 1 : i + 2] = affine.inverse(z[:, i + 1 : i + 2], shift, log_scale)
        return self.reorder(x)
