"""A batch of images on its way from noise: which stream sees which label, block after block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.flow.block import Labels
from flowback.sampling.decoder import Decoder, Engine
from flowback.sampling.guidance import Guidance
from flowback.sampling.jacobi import Init, jacobi
from flowback.sampling.sequential import sequential

__all__ = ["Batch", "BlockPlan", "new_tokens", "solve"]


@dataclass(frozen=True)
class BlockPlan:
    """How one block is inverted."""

    window: int = 1
    """Tokens solved together; 1 is sequential."""
    init: Init = "z"
    """What the sweeps start from."""
    tolerance: float | None = 1e-3
    """A window is done when no value changed by more in a sweep; None sweeps to exactness."""


def solve(decoder: Decoder, z: Float[Tensor, "b n d"], plan: BlockPlan) -> Float[Tensor, "b n d"]:
    """The inverse of a block as planned, in the block's own order."""
    if plan.window == 1:
        return sequential(decoder, z)
    return jacobi(decoder, z, plan.window, plan.tolerance, plan.init).x


@dataclass(frozen=True)
class Batch:
    """The images of one batch: labels and guidance of each."""

    engine: Engine
    labels: Labels
    guidance: Guidance
    scales: Float[Tensor, " b"]
    """Guidance scale of each image."""

    def decoder(self, index: int, new: int = 1) -> Decoder:
        """The decoder of block ``index`` (from 1), with room for ``new`` tokens a step."""
        config, count = self.engine.flow.config, len(self.scales)
        block = self.engine.flow.blocks[index - 1]
        context = block.context(self.labels)
        if not self.guidance.covers(index, config.blocks):
            return self.engine.decoder(index, count, context, new=new)
        # One batch of 2B rows: with label, then without.
        without = block.context(None)
        if context is not None and without is not None:
            context = torch.cat([context.expand(count, -1), without.expand(count, -1)])
        temperature = torch.ones(2, dtype=self.scales.dtype, device=self.scales.device)
        temperature[1] = self.guidance.temperature
        guide = self.guidance.guide(self.scales, config.tokens)
        return self.engine.decoder(index, count, context, guide, temperature.repeat_interleave(count), new)

    def invert(
        self, z: Float[Tensor, "b n d"], plans: Sequence[BlockPlan] | None = None
    ) -> Iterator[Float[Tensor, "b n d"]]:
        """The outputs of blocks T ... 1, tokens in raster order.

        Args:
            z: the noise.
            plans: one a block, from block 1; None is sequential.
        """
        for index in range(self.engine.flow.config.blocks, 0, -1):
            block = self.engine.flow.blocks[index - 1]
            plan = BlockPlan() if plans is None else plans[index - 1]
            decoder = self.decoder(index, new_tokens(plan))
            z = block.reorder(solve(decoder, block.reorder(z), plan))
            yield z


def new_tokens(plan: BlockPlan) -> int:
    """Most tokens in one step of such a solution: a window, and a window before it whose keys are stale."""
    return 1 if plan.window == 1 else 2 * plan.window
