"""Denoising with the flow's own score: once (TARFlow, arXiv 2412.06329, Sec. 2.4), or down a row of levels.

The flow models images with Gaussian noise on them. By Tweedie's formula the mean of the clean image given
the noisy one is x̂ = x + σ²·∇ log p(x): one forward and one backward pass, in which the weights are constants.
A flow trained over a range of noise levels knows this mean at each of them, and can go down in steps
(iTARFlow, arXiv 2604.20041): :mod:`flowback.sampling.solver`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.checked import require, require_one_of
from flowback.errors import InputError
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.frozen import constant, frozen
from flowback.flow.levels import UserLevels
from flowback.sampling.solver import Method, Spacing, solve, spaced_levels
from flowback.task_config import SampleConfig

__all__ = ["Denoising", "denoise", "denoised_states", "denoises", "images_at_once"]

_STEPS = 10
"""Of a flow trained over a range of levels."""
_BUDGET = 2**30
"""Bytes of activations that one denoising pass may hold."""
_ACTIVATIONS = 24
"""Tensors of the size (tokens, width) that autograd keeps in one layer, about."""


@dataclass(frozen=True)
class Denoising:
    """In how many steps, by which method and at which levels images are denoised."""

    steps: int | None = None
    """Noise levels; None: 10 of a flow trained over a range, 1 of any other."""
    method: Method = "euler"
    """How to go from one level to the next."""
    spacing: Spacing = "linear"
    """How the levels are spaced."""
    last: float | None = None
    """The last level, on the [-1, 1] scale; None: the lowest of training. The first is that of drawing."""
    clamp: bool = False
    """Clamp each x̂ to [-1, 1]."""
    guidance: float = 0.0
    """w of c + w · (c − u) on x̂ with (c) and without (u) the label; 0 is off. It doubles the cost."""

    def __post_init__(self) -> None:
        require_one_of(self.method, Method, "method of denoising")
        require_one_of(self.spacing, Spacing, "spacing of noise levels")
        require(self.steps is None or self.steps >= 1, f"--denoise-steps is {self.steps}; give at least 1.")
        require(
            math.isfinite(self.guidance),
            f"--denoise-guidance is {self.guidance}; it must be a finite number, 0 for none.",
        )

    @classmethod
    def from_config(cls, config: SampleConfig) -> Denoising:
        """The denoising that the options of sampling describe."""
        return cls(
            config.denoise_steps,
            config.denoise_method,
            config.denoise_spacing,
            config.denoise_last,
            config.denoise_clamp,
            config.denoise_guidance,
        )

    def levels(self, flow: TARFlow, first: float | None = None) -> tuple[float, ...]:
        """The levels of the steps, the largest first; none for a flow that :func:`denoises` is false of.

        Args:
            flow: the model.
            first: level of drawing, for a flow with a range of levels; None: its highest.

        Raises:
            InputError: several steps of a flow of one level, levels that do not decrease, or that the flow
                does not have.
        """
        config = flow.config
        if config.noise != "range":
            if self.last is not None or (self.steps or 1) > 1:
                known = f"one noise level, {config.noise_std:g}" if denoises(flow) else "no noise level"
                raise InputError(
                    f"This flow knows {known}, and cannot be denoised in steps: train one with --model.noise "
                    "range, or leave --denoise-steps and --denoise-last out."
                )
            return (config.noise_std,) if denoises(flow) else ()
        first = config.noise_max if first is None else first
        last = config.noise_min if self.last is None else self.last
        steps = self.steps or (1 if self.last is None and first <= last else _STEPS)
        levels = spaced_levels(first, last, steps, self.spacing)
        for level in (levels[0], levels[-1]):
            flow.levels(level, 1)
        return levels

    def check(self, labelled: bool, latent: bool = False) -> None:
        """Refuse options that would do nothing, or harm, before work starts.

        Args:
            labelled: whether there are labels.
            latent: whether a VAE decodes what is denoised.

        Raises:
            InputError: guidance without labels, or latents that are clamped.
        """
        require(
            not self.guidance or labelled,
            "--denoise-guidance without labels does nothing: give labels, or leave it out.",
        )
        require(
            not self.clamp or not latent,
            "--denoise-clamp is for images on [-1, 1], and latents go beyond: leave it out.",
        )


def denoises(flow: TARFlow) -> bool:
    """Whether the flow was trained with Gaussian noise; for uniform dequantisation there is no such step."""
    return bool(flow.config.noise_level)


def images_at_once(flow: TARFlow) -> int:
    """Images whose activations fit the memory that denoising allows itself (1 GiB)."""
    config = flow.config
    values = sum(config.depths) * config.tokens * config.width * _ACTIVATIONS
    return max(1, _BUDGET // (values * flow.dtype.itemsize))


def denoise(
    flow: TARFlow,
    images: Float[Tensor, "b c h w"],
    labels: Labels = None,
    chunk: int | None = None,
    *,
    noise: UserLevels = None,
) -> Float[Tensor, "b c h w"]:
    """The denoised images, x̂ = x + σ²·∇ log p(x | label), σ the noise of training, or the given level of it.

    Where :func:`denoises` is false, the images as they are.

    Args:
        flow: the model.
        images: samples of the flow, on [-1, 1].
        labels: those of the sampling.
        chunk: images in one pass; None takes :func:`images_at_once`.
        noise: σ, for a flow with a range of levels.

    Raises:
        InputError: a level that the flow does not have.
    """
    if not denoises(flow):
        return images
    chunk, encode = chunk or images_at_once(flow), frozen(flow)
    levels = flow.levels(noise, len(images))
    clean = []
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        # Tensors made in inference mode cannot have gradients; their copies can.
        with torch.inference_mode(False), torch.enable_grad():
            part_labels = None if labels is None else constant(labels[part])
            part_levels = None if levels is None else constant(levels[part])
            x = images[part].detach().clone().requires_grad_()
            (score,) = torch.autograd.grad(encode(x, part_labels, noise=part_levels).log_prob.sum(), x)
            if part_levels is None:
                clean.append(torch.add(x.detach(), score, alpha=flow.config.noise_std**2))
            else:
                clean.append(torch.addcmul(x.detach(), score, part_levels.square()[:, None, None, None]))
    return torch.cat(clean) if clean else images


def denoised_states(
    flow: TARFlow,
    images: Float[Tensor, "b c h w"],
    labels: Labels = None,
    denoising: Denoising | None = None,
    draw: Callable[[int], Tensor] | None = None,
    *,
    noise: float | None = None,
) -> Iterator[Float[Tensor, "b c h w"]]:
    """The images after each step of denoising; none where :func:`denoises` is false.

    Args:
        flow: the model.
        images: samples of the flow, on [-1, 1].
        labels: those of the sampling, checked.
        denoising: its options; None is the default ones.
        draw: standard normal noise for each step, from 1; only the method ``stochastic`` needs it.
        noise: level of the samples, for a flow with a range of levels; None: its highest.

    Raises:
        InputError: levels that the flow does not have.
    """
    denoising = denoising or Denoising()
    levels = denoising.levels(flow, noise)

    def mean(x: Tensor, t: float) -> Tensor:
        level = t if flow.config.noise == "range" else None
        clean = denoise(flow, x, labels, noise=level)
        if denoising.guidance:
            clean = torch.lerp(denoise(flow, x, noise=level), clean, 1 + denoising.guidance)
        return clean.clamp(-1, 1) if denoising.clamp else clean

    if levels:
        yield from solve(mean, images, levels, denoising.method, draw)
