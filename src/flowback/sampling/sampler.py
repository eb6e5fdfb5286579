"""Draw images: noise through the blocks T ... 1 backwards, then one denoising step.

The noise of an image comes from its own seed, on the CPU, so an image does not depend on the batch it is
drawn in, on the device, or on how many processes draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.errors import InputError
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.tarflow import UserLabels
from flowback.sampling.decoder import Decoder, Engine, Precision, sequential
from flowback.sampling.denoise import denoise as denoise_step
from flowback.sampling.guidance import Guidance
from flowback.sampling.jacobi import Init, jacobi

__all__ = ["Batch", "BlockPlan", "check_guidance", "new_tokens", "noise", "sample", "solve", "trajectory"]


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


_SEEDS = 2**32


def noise(flow: TARFlow, seeds: Sequence[int], redraw: int = 0) -> Float[Tensor, "b n d"]:
    """Standard normal tokens, drawn in fp32 on the CPU from one generator an image.

    Args:
        flow: gives shape, device and dtype.
        seeds: one an image, 0 ... 2³² − 1.
        redraw: 0 is the seed itself; 1, 2, ... are further independent draws under the same seed.

    Raises:
        InputError: a seed out of range.
    """
    config = flow.config
    z = torch.empty(len(seeds), config.tokens, config.token_dim)
    for row, seed in zip(z, seeds, strict=True):
        if not 0 <= seed < _SEEDS:
            raise InputError(f"Seed {seed} is out of range; seeds go from 0 to {_SEEDS - 1}.")
        own = int(np.random.SeedSequence((seed, redraw)).generate_state(1)[0]) if redraw else int(seed)
        row.normal_(generator=torch.Generator().manual_seed(own))
    return z.to(flow.device, flow.dtype)


def sample(
    flow: TARFlow,
    labels: UserLabels = None,
    seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
    guidance: Guidance | float | Sequence[float] | Tensor = 0.0,
    denoise: bool = True,
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    plans: Sequence[BlockPlan] | None = None,
    redraw: int = 0,
) -> Float[Tensor, "b c h w"]:
    """Images of the flow on [-1, 1], not clamped; non-finite values are returned as they are.

    Args:
        flow: the model.
        labels: class ids or soft class weights, one an image; one id for all; None is unconditional.
        seeds: one an image; None counts from 0, one for each label.
        guidance: w of ``c + w · (c − u)``, or a :class:`Guidance` for all its options.
        denoise: end with one denoising step, given the labels too. Models of uniformly dequantised images
            have none: theirs are returned as sampled.
        batch_size: most images decoded at once.
        precision: of the Transformers' weights and caches while decoding.
        plans: how each block is inverted, from block 1 (see ``flowback plan``); None is sequential, which
            is exact.
        redraw: see :func:`noise`.

    Raises:
        InputError: labels, seeds or guidance that do not fit the model or each other.

    Example:
        >>> from flowback import Flow, ModelConfig, sample
        >>> flow = Flow(ModelConfig(image_size=4, channels=1, patch_size=2, width=16, blocks=1,
        ...                         layers=1, head_dim=16, num_classes=3))
        >>> sample(flow, [0, 1], seeds=[7, 8], guidance=1.0).shape
        torch.Size([2, 1, 4, 4])
    """
    return trajectory(
        flow,
        labels,
        seeds,
        guidance,
        denoise,
        batch_size=batch_size,
        precision=precision,
        plans=plans,
        redraw=redraw,
        every_block=False,
    )[-1]


@torch.no_grad()
def trajectory(
    flow: TARFlow,
    labels: UserLabels = None,
    seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
    guidance: Guidance | float | Sequence[float] | Tensor = 0.0,
    denoise: bool = True,
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    plans: Sequence[BlockPlan] | None = None,
    redraw: int = 0,
    every_block: bool = True,
) -> list[Float[Tensor, "b c h w"]]:
    """The way of :func:`sample` from noise to image: z, the output of blocks T ... 1, the denoised image."""
    seeds = _seeds(labels, seeds)
    checked = flow.labels(labels, len(seeds))
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    check_guidance(flow, checked is not None, guidance)
    scales = guidance.scales(len(seeds), noise(flow, seeds[:1]))
    engine, parts = Engine(flow, precision), []
    size = engine.images_at_once(batch_size, guidance.active)
    for start in range(0, len(seeds), size):
        part = slice(start, start + size)
        own = None if checked is None else checked[part]
        z = noise(flow, seeds[part], redraw)
        states = [z, *Batch(engine, own, guidance, scales[part]).invert(z, plans)]
        states = [flow.images(x) for x in (states if every_block else states[-1:])]
        if denoise:
            states.append(denoise_step(flow, states[-1], own))
        parts.append(states)
    return [torch.cat(list(stage)) for stage in zip(*parts, strict=True)]


def _seeds(labels: object, seeds: Sequence[int] | Tensor | None) -> list[int]:
    count = len(labels) if isinstance(labels, (Sequence, Tensor)) and np.ndim(labels) else None
    if seeds is None:
        return list(range(1 if count is None else count))
    made = [int(seed) for seed in seeds]
    if not made:
        raise InputError("There are no seeds; give one for each image.")
    if count is not None and count != len(made):
        raise InputError(f"{count} labels for {len(made)} seeds; give one seed and one label an image.")
    return made


def check_guidance(flow: TARFlow, labelled: bool, guidance: Guidance) -> None:
    """Refuse guidance that cannot do anything, before work starts.

    Raises:
        InputError: no labels and no attention temperature, or more guided blocks than there are.
    """
    if guidance.active and not labelled and guidance.temperature == 1:
        raise InputError(
            "Guidance without labels does nothing: give labels, or an attention temperature other than 1 "
            "(--attention-temperature 1.5, say)."
        )
    if guidance.blocks is not None and guidance.blocks > flow.config.blocks:
        raise InputError(f"{guidance.blocks} guided blocks, but the model has {flow.config.blocks}.")
