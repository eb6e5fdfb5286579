"""Draw images: noise through the blocks T ... 1 backwards, then denoising with the flow's own score.

The noise of an image comes from its own seed, on the CPU, so an image does not depend on the batch it is
drawn in, on the device, or on how many processes draw.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.checked import require, require_one_of
from flowback.errors import InputError, shorten
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.image_model import ImageModel, UserLabels
from flowback.sampling.decoder import Decoder, Engine, Precision, sequential
from flowback.sampling.denoise import Denoising, denoised_states
from flowback.sampling.guidance import Guidance
from flowback.sampling.jacobi import Init, jacobi
from flowback.task_config import SampleConfig

__all__ = ["BlockPlan", "Guess", "Overflow", "Sampler", "drawing_level", "noise", "sample", "seeds_of"]


@dataclass(frozen=True)
class BlockPlan:
    """How one block is inverted."""

    window: int = 1
    """Tokens solved together; 1 is sequential."""
    init: Init = "z"
    """What the sweeps start from."""
    tolerance: float | None = 1e-3
    """A window is done when no value changes by more than this in a sweep; None sweeps until exact."""

    def __post_init__(self) -> None:
        require(self.window >= 1, f"The window of a block's plan is {self.window}; it must be at least 1.")
        require_one_of(self.init, Init, "start of sweeps")

    @property
    def new(self) -> int:
        """Most tokens in one step: a window, and a window before it whose keys and values are stale."""
        return 1 if self.window == 1 else 2 * self.window

    def solve(
        self, decoder: Decoder, z: Float[Tensor, "b n d"], guess: Float[Tensor, "b n d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The inverse of a block, in the block's own order; ``guess`` takes the place of ``init``."""
        if self.window == 1:
            return sequential(decoder, z)
        return jacobi(decoder, z, self.window, self.tolerance, self.init if guess is None else guess).x

    @classmethod
    def windows(cls, flow: TARFlow, config: SampleConfig) -> tuple[BlockPlan, ...] | None:
        """The windows of ``--sampler jacobi`` in all blocks; None (sequential) for other samplers."""
        if config.sampler != "jacobi":
            return None
        every = cls(min(config.window, flow.config.tokens), "z", config.tolerance)
        return (every,) * flow.config.blocks


@runtime_checkable
class Guess(Protocol):
    """Estimates of the outputs of all blocks, for sweeps to start from."""

    def __call__(
        self, z: Float[Tensor, "b n d"], labels: Labels, scales: Float[Tensor, " b"]
    ) -> Sequence[Float[Tensor, "b n d"]]:
        """Outputs of blocks T ... 1, tokens in raster order.

        Args:
            z: the noise.
            labels: checked ones.
            scales: guidance scale of each image.
        """
        ...


@dataclass(frozen=True)
class Overflow:
    """Where an image first became non-finite, on the way from noise to image."""

    block: int | None
    """Block whose inverse gave it, from 1 at the data; None: denoising gave it."""
    token: int | None
    """The token's place in the image, from 0 in raster order: the first one in the block's own order."""
    step: int | None = None
    """Step of denoising that gave it, from 1; None: a block gave it, or there is one step only."""

    def __str__(self) -> str:
        return self.stage if self.block is None else f"{self.stage}, token {self.token}"

    @property
    def stage(self) -> str:
        """The block, or the step of denoising, in words."""
        if self.block is not None:
            return f"block {self.block}"
        return "denoising" if self.step is None else f"denoising step {self.step}"


class Sampler:
    """Draws images from one flow: packs weights, allocates caches and records CUDA graphs once for all calls.

    Use a sampler in one thread only, and make a new one when the flow's weights change.

    Args:
        flow: the model.
        guidance: w of ``c + w · (c − u)``, or a :class:`Guidance` for all its options.
        denoise: end with denoising, with the same labels, or a :class:`Denoising` for all its options.
            Models of uniformly dequantised images have no score to denoise with.
        batch_size: most images decoded at once.
        precision: of the Transformers' weights and caches while decoding.
        plans: how each block is inverted, from block 1 (:func:`flowback.plan_sampling` measures it); None is
            sequential, which is exact.
        guess: what the sweeps of a block start from, in place of what its plan says.
        noise: level to draw at, for a flow with a range of them; None is its highest (arXiv 2604.20041).

    Raises:
        InputError: more guided blocks than the flow has, not one plan per block, or noise levels that the
            flow does not have.

    Example:
        >>> from flowback import Flow, ModelConfig, Sampler
        >>> flow = Flow(ModelConfig(image_size=4, channels=1, patch_size=2, width=16, blocks=1,
        ...                         layers=1, head_dim=16, num_classes=3))
        >>> sampler = Sampler(flow, guidance=1.0)
        >>> for labels, seeds in (([0, 1], [7, 8]), ([2, 2], [9, 10])):
        ...     print(sampler(labels, seeds).shape)
        torch.Size([2, 1, 4, 4])
        torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        flow: TARFlow,
        guidance: Guidance | float | Sequence[float] | Tensor = 0.0,
        denoise: bool | Denoising = True,
        *,
        batch_size: int = 64,
        precision: Precision = "fp32",
        plans: Sequence[BlockPlan] | None = None,
        guess: Guess | None = None,
        noise: float | None = None,
    ) -> None:
        self.flow, self.guess = flow, guess
        self.noise = drawing_level(flow, noise)
        """Level that images are drawn at; None for a flow that has only one."""
        self.denoising = Denoising() if isinstance(denoise, bool) else denoise
        self.levels = self.denoising.levels(flow, self.noise) if denoise else ()
        """Noise levels of the steps of denoising; empty for none."""
        self.guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        blocks = flow.config.blocks
        if batch_size < 1:
            raise InputError(f"The batch size is {batch_size}; it must be at least 1.")
        if plans is not None and len(plans) != blocks:
            raise InputError(f"{len(plans)} plans for a model of {blocks} blocks; give one for each.")
        if self.guidance.blocks is not None and self.guidance.blocks > blocks:
            raise InputError(
                f"{self.guidance.blocks} guided blocks, but the model has {blocks}; guide fewer."
            )
        self.plans = (BlockPlan(),) * blocks if plans is None else tuple(plans)
        with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the caller's mode
            self.engine = Engine(flow, precision)
        self.images_at_once = self.engine.images_at_once(batch_size, self.guidance.active)
        """Images decoded together."""

    @classmethod
    def from_config(
        cls, flow: TARFlow, config: SampleConfig, plan: Sequence[BlockPlan] | None = None
    ) -> Sampler:
        """The sampler that the options describe.

        Args:
            flow: the model.
            config: the options. Without a plan, ``auto`` is sequential;
                :func:`flowback.sampling.block_plan.resolve_plan` finds a checkpoint's.
            plan: how each block is inverted, from block 1, in place of what ``config.sampler`` says.

        Raises:
            InputError: options that do not fit the flow, or are none of a flow's.
        """
        for option, given in (
            ("--sampler student+exact", config.sampler == "student+exact"),
            ("--evaluations", config.evaluations is not None),
            ("--solver", config.solver is not None),
        ):
            if given:
                raise InputError(f"{option} is of students, and this model is a flow; leave it out.")
        return cls(
            flow,
            Guidance.from_config(config),
            config.denoise and Denoising.from_config(config),
            batch_size=config.batch_size,
            precision=config.precision,
            plans=BlockPlan.windows(flow, config) if plan is None else plan,
            noise=config.noise,
        )

    def check(self, labelled: bool, latent: bool = False) -> None:
        """Refuse options that would do nothing, or harm, before work starts.

        Args:
            labelled: whether images are drawn with labels.
            latent: whether a VAE decodes them.

        Raises:
            InputError: guidance without labels, or latents that are clamped to the range of images.
        """
        self.guidance.check(labelled)
        if self.levels:
            self.denoising.check(labelled, latent)

    def __call__(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
        redraw: int = 0,
    ) -> Float[Tensor, "b c h w"]:
        """Images on [-1, 1], not clamped; non-finite values are returned as they are.

        Args:
            labels: class ids, names or soft class weights, one per image; one id for all; None is
                unconditional.
            seeds: one per image; None counts from 0, one for each label.
            redraw: see :func:`noise`.

        Raises:
            InputError: labels, seeds or guidance that do not fit the model or each other.
        """
        return torch.cat([states[-1] for states in self._parts(labels, seeds, redraw, every_block=False)])

    def trajectory(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
        redraw: int = 0,
    ) -> list[Float[Tensor, "b c h w"]]:
        """The way from noise to images: z, the outputs of blocks T ... 1, and those of denoising's steps.

        Arguments are those of a call; its images come last.
        """
        parts = self._parts(labels, seeds, redraw, every_block=True)
        return [torch.cat(list(stage)) for stage in zip(*parts, strict=True)]

    def overflows(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
        redraw: int = 0,
    ) -> list[Overflow | None]:
        """Where each image first became non-finite; None for finite images.

        Arguments are those of a call. The images are drawn again, so pass only those that are not finite.
        """
        _, *states = self.trajectory(labels, seeds, redraw)
        blocks = list(range(self.flow.config.blocks, 0, -1))
        return [self._overflow([state[row] for state in states], blocks) for row in range(len(states[0]))]

    def _overflow(self, states: list[Float[Tensor, "c h w"]], blocks: list[int]) -> Overflow | None:
        for index, state in zip(blocks, states, strict=False):
            finite = self.flow.tokens(state[None])[0].isfinite().all(1)
            if not finite.all():
                order = self.flow.blocks[index - 1].reorder(torch.arange(len(finite)), dim=0)
                return Overflow(index, int(order[int(finite[order].int().argmin())]))
        steps = states[len(blocks) :]
        broken = [step for step, state in enumerate(steps, start=1) if not state.isfinite().all()]
        return Overflow(None, None, broken[0] if len(steps) > 1 else None) if broken else None

    def follow(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
        redraw: int = 0,
    ) -> Iterator[tuple[slice, Float[Tensor, "_ c h w"]]]:
        """The states of :meth:`trajectory`, each as soon as it is there: which images, and their state.

        Images decoded together come together; a batch is done before the next one begins.
        """
        for part, states in self._batches(labels, seeds, redraw):
            for state in states:
                yield part, state

    def _parts(
        self,
        labels: UserLabels,
        seeds: Sequence[int] | Tensor | None,
        redraw: int,
        every_block: bool,
    ) -> list[list[Tensor]]:
        """The trajectories of batches, or their ends."""
        batches = self._batches(labels, seeds, redraw)
        return [list(states) if every_block else list(deque(states, maxlen=1)) for _, states in batches]

    def _batches(
        self, labels: UserLabels, seeds: Sequence[int] | Tensor | None, redraw: int
    ) -> Iterator[tuple[slice, Iterator[Tensor]]]:
        """Batches of what is asked for, and the trajectory of each; one must be read before the next."""
        seeds = seeds_of(labels, seeds)
        with torch.inference_mode(False), torch.no_grad():
            checked = self.flow.labels(labels, len(seeds))
            self.check(checked is not None)
            scales = self.guidance.scales(len(seeds), self.flow.blocks[0].proj_in.weight)
        for start in range(0, len(seeds), self.images_at_once):
            part = slice(start, start + self.images_at_once)
            part_labels = None if checked is None else checked[part]
            yield part, _step_by_step(self._states(seeds[part], part_labels, scales[part], redraw))

    def _states(
        self, seeds: Sequence[int], labels: Labels, scales: Float[Tensor, " b"], redraw: int
    ) -> Iterator[Tensor]:
        """The trajectory of one batch."""
        z = noise(self.flow, seeds, redraw)
        images = self.flow.images(z)
        yield images
        for tokens in self.invert(z, labels, scales):
            images = self.flow.images(tokens)
            yield images
        yield from self.denoised(images, labels, seeds, redraw)

    def denoised(
        self, images: Float[Tensor, "b c h w"], labels: Labels, seeds: Sequence[int], redraw: int = 0
    ) -> Iterator[Float[Tensor, "b c h w"]]:
        """The images after each step of denoising; none where the sampler does not denoise.

        Args:
            images: with the noise of the sampler's level.
            labels: checked ones.
            seeds: of the noise between steps, one an image.
            redraw: see :func:`noise`.
        """

        def draw(step: int) -> Tensor:
            return self.flow.images(noise(self.flow, seeds, redraw, step))

        if self.levels:
            yield from denoised_states(self.flow, images, labels, self.denoising, draw, noise=self.noise)

    def invert(
        self,
        z: Float[Tensor, "b n d"],
        labels: Labels,
        scales: Float[Tensor, " b"],
        plans: Sequence[BlockPlan] | None = None,
    ) -> Iterator[Float[Tensor, "b n d"]]:
        """The outputs of blocks T ... 1 for one batch, tokens in raster order.

        Args:
            z: the noise.
            labels: checked ones.
            scales: guidance scale of each image.
            plans: one a block, from block 1; None is the sampler's own.
        """
        guesses = None if self.guess is None else self.guess(z, labels, scales)
        for index in range(self.flow.config.blocks, 0, -1):
            block, plan = self.flow.blocks[index - 1], (plans or self.plans)[index - 1]
            decoder = self.decoder(index, labels, scales, plan.new)
            start = None if guesses is None else block.reorder(guesses[self.flow.config.blocks - index])
            z = block.reorder(plan.solve(decoder, block.reorder(z), start))
            yield z

    def decoder(self, index: int, labels: Labels, scales: Float[Tensor, " b"], new: int = 1) -> Decoder:
        """The decoder of block ``index`` (from 1) for one batch, with room for ``new`` tokens a step.

        The decoder before it can no longer be used.
        """
        config, count, block = self.flow.config, len(scales), self.flow.blocks[index - 1]
        levels = self.flow.levels(self.noise, count)
        context = block.context(labels, levels=levels)
        if not self.guidance.covers(index, config.blocks):
            return self.engine.decoder(index, count, context, new=new)
        # One batch of 2B rows: with label, then without.
        without = block.context(None, levels=levels)
        if context is not None and without is not None:
            context = torch.cat([context.expand(count, -1), without.expand(count, -1)])
        temperature = None
        if self.guidance.temperature != 1:
            temperature = torch.ones(2 * count, dtype=scales.dtype, device=scales.device)
            temperature[count:] = self.guidance.temperature
        guide = self.guidance.guide(scales, config.tokens)
        return self.engine.decoder(index, count, context, guide, temperature, new)


def _step_by_step(states: Iterator[Tensor]) -> Iterator[Tensor]:
    """The states, each computed outside of the caller's modes (inference mode, gradients), which stay on."""
    while True:
        with torch.inference_mode(False), torch.no_grad():
            state = next(states, None)
        if state is None:
            return
        yield state


def drawing_level(flow: TARFlow, level: float | None) -> float | None:
    """The noise level that images are drawn at: by default a range's highest. None for a flow of one level.

    Raises:
        InputError: a level that the flow does not have.
    """
    if level is None and flow.config.noise == "range":
        level = flow.config.noise_max
    return level if flow.levels(level, 1) is not None else None


_SEEDS = 2**32


def noise(flow: ImageModel, seeds: Sequence[int], redraw: int = 0, step: int = 0) -> Float[Tensor, "b n d"]:
    """Standard normal tokens, drawn in fp32 on the CPU from one generator per image.

    Args:
        flow: gives shape, device and dtype.
        seeds: one per image, 0 ... 2³² − 1.
        redraw: 0 is the seed itself; 1, 2, ... are further independent draws under the same seed.
        step: 0 is the noise to decode; 1, 2, ... are the draws of stochastic denoising.

    Raises:
        InputError: a seed out of range.
    """
    config = flow.config
    z = torch.empty(len(seeds), config.tokens, config.token_dim)
    for row, seed in zip(z, seeds, strict=True):
        if not 0 <= seed < _SEEDS:
            raise InputError(f"Seed {seed} is out of range; seeds go from 0 to {_SEEDS - 1}.")
        image_seed = int(seed)
        if redraw or step:
            image_seed = int(np.random.SeedSequence((image_seed, redraw, step)).generate_state(1)[0])
        row.normal_(generator=torch.Generator().manual_seed(image_seed))
    return z.to(flow.device, flow.data_dtype)


def sample(
    flow: TARFlow,
    labels: UserLabels = None,
    seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
    guidance: Guidance | float | Sequence[float] | Tensor = 0.0,
    denoise: bool | Denoising = True,
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    plans: Sequence[BlockPlan] | None = None,
    redraw: int = 0,
    noise: float | None = None,
) -> Float[Tensor, "b c h w"]:
    """Images of the flow on [-1, 1], not clamped; non-finite values are returned as they are.

    A single call of a :class:`Sampler`, which explains the options; for many calls, use it directly.

    Raises:
        InputError: labels, seeds or guidance that do not fit the model or each other.

    Example:
        >>> from flowback import Flow, ModelConfig, sample
        >>> flow = Flow(ModelConfig(image_size=4, channels=1, patch_size=2, width=16, blocks=1,
        ...                         layers=1, head_dim=16, num_classes=3))
        >>> sample(flow, [0, 1], seeds=[7, 8], guidance=1.0).shape
        torch.Size([2, 1, 4, 4])
    """
    sampler = Sampler(
        flow, guidance, denoise, batch_size=batch_size, precision=precision, plans=plans, noise=noise
    )
    return sampler(labels, seeds, redraw)


def seeds_of(labels: object, seeds: Sequence[int] | Tensor | None) -> list[int]:
    """Seeds as whole numbers; None counts from 0, one for each label.

    Raises:
        InputError: no seeds, not whole numbers, or not as many as labels.
    """
    count = len(labels) if isinstance(labels, (Sequence, Tensor)) and np.ndim(labels) else None
    if seeds is None:
        return list(range(1 if count is None else count))
    try:
        numbers = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise InputError(f"Seeds are whole numbers, not {shorten(str(seeds))}.") from None
    if not numbers:
        raise InputError("There are no seeds; give one for each image.")
    if count is not None and count != len(numbers):
        raise InputError(f"{count} labels for {len(numbers)} seeds; give one seed and one label per image.")
    return numbers
