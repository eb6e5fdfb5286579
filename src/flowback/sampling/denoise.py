"""Denoising with the flow's own score: once (TARFlow, arXiv 2412.06329, Sec. 2.4), or down a row of levels.

The flow models images with Gaussian noise on them. By Tweedie's formula the mean of the clean image given
the noisy one is x̂ = x + σ²·∇ log p(x): one forward and one backward pass, in which the weights are constants.
A flow that was trained on a range of noise levels knows this mean at each of them, and can go down in steps
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
from flowback.config import SampleConfig
from flowback.errors import InputError
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.frozen import constant, frozen
from flowback.sampling.solver import Mean, Method, Spacing, solve, spaced_levels

__all__ = ["Denoising", "clean_mean", "denoise", "denoised_states", "denoises", "images_at_once"]

_STEPS = 10
"""Of a flow that was trained on a range of levels."""
_BUDGET = 2**30
"""Bytes of activations that one denoising pass may hold."""
_ACTIVATIONS = 24
"""Tensors of the size (tokens, width) that autograd keeps in one layer, about."""


@dataclass(frozen=True)
class Denoising:
    """In which steps, with which method and at which levels images are denoised."""

    steps: int | None = None
    """Noise levels; None: 10 of a flow that was trained on a range of levels, 1 of any other."""
    method: Method = "euler"
    """How to go from one level to the next."""
    spacing: Spacing = "linear"
    """How the levels are spaced."""
    range: tuple[float, float] | None = None
    """First and last level, standard deviations of noise on the [-1, 1] scale; None: those of training. The
    images are decoded at the first one."""
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
            config.denoise_range,
            config.denoise_clamp,
            config.denoise_guidance,
        )

    def levels(self, flow: TARFlow) -> tuple[float, ...]:
        """The levels of a flow's denoising, the largest first; none for one that :func:`denoises` is false of.

        Raises:
            InputError: several levels of a flow that knows one, or levels that it was not trained on.
        """
        config = flow.config
        if config.noise != "range":
            if self.range is not None or (self.steps or 1) > 1:
                known = f"one noise level, {config.noise_std:g}" if denoises(flow) else "no noise level"
                raise InputError(
                    f"This flow knows {known}, and cannot be denoised in steps: train one with --model.noise "
                    "range, or leave --denoise-steps and --denoise-range out."
                )
            return (config.noise_std,) if denoises(flow) else ()
        low, high = config.noise_min, config.noise_max
        first, last = self.range or (high, low)
        levels = spaced_levels(first, last, self.steps or _STEPS, self.spacing)
        if not low <= levels[-1] <= levels[0] <= high:
            raise InputError(
                f"--denoise-range {first:g} {last:g} leaves the noise levels that the flow was trained on, "
                f"{low:g} to {high:g}; choose levels among them."
            )
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
    return flow.config.noise == "range" or (flow.config.noise == "gaussian" and flow.config.noise_std > 0)


def images_at_once(flow: TARFlow) -> int:
    """Images whose activations fit the memory that denoising allows itself (1 GiB)."""
    config = flow.config
    values = config.blocks * config.layers * config.tokens * config.width * _ACTIVATIONS
    return max(1, _BUDGET // (values * flow.dtype.itemsize))


def clean_mean(
    flow: TARFlow,
    labels: Labels = None,
    guidance: float = 0.0,
    clamp: bool = False,
    chunk: int | None = None,
) -> Mean:
    """x̂(x, t) = x + t²·∇ log p(x | label, t) of noisy images (B, C, H, W), by Tweedie's formula.

    Args:
        flow: the model; its weights are taken as they are now.
        labels: checked ones, of the images.
        guidance: w of c + w · (c − u), with (c) and without (u) the label.
        clamp: to [-1, 1], at the end.
        chunk: images in one pass; None takes :func:`images_at_once`.
    """
    chunk = chunk or images_at_once(flow)
    encode = frozen(flow)

    def tweedie(x: Tensor, t: float, labels: Labels) -> Tensor:
        # Tensors made in inference mode cannot have gradients; their copies can.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            (score,) = torch.autograd.grad(encode(x, labels).log_prob.sum(), x)
            return torch.add(x.detach(), score, alpha=t**2)

    def mean(x: Tensor, t: float) -> Tensor:
        means = []
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            clean = tweedie(x[part], t, None if labels is None else constant(labels[part]))
            if guidance:
                clean = torch.lerp(tweedie(x[part], t, None), clean, 1 + guidance)
            means.append(clean)
        joined = torch.cat(means) if means else x
        return joined.clamp(-1, 1) if clamp else joined

    return mean


def denoised_states(
    flow: TARFlow,
    images: Float[Tensor, "b c h w"],
    labels: Labels = None,
    denoising: Denoising | None = None,
    draw: Callable[[int], Tensor] | None = None,
    chunk: int | None = None,
) -> Iterator[Float[Tensor, "b c h w"]]:
    """The images after each step of denoising; none where :func:`denoises` is false.

    Args:
        flow: the model.
        images: samples of the flow at the first level, on [-1, 1].
        labels: those of the sampling, checked.
        denoising: its options; None is the default ones.
        draw: standard normal noise for each step, from 1; only the method ``stochastic`` needs it.
        chunk: images in one pass; None takes :func:`images_at_once`.

    Raises:
        InputError: levels that the flow does not know.
    """
    denoising = denoising or Denoising()
    levels = denoising.levels(flow)
    if levels:
        mean = clean_mean(flow, labels, denoising.guidance, denoising.clamp, chunk)
        yield from solve(mean, images, levels, denoising.method, draw)


def denoise(
    flow: TARFlow, images: Float[Tensor, "b c h w"], labels: Labels = None, chunk: int | None = None
) -> Float[Tensor, "b c h w"]:
    """The denoised images; of a flow with one level σ, x + σ²·∇ log p(x | label).

    Where :func:`denoises` is false, the images as they are.

    Args:
        flow: the model.
        images: samples of the flow, on [-1, 1].
        labels: those of the sampling.
        chunk: images in one pass; None takes :func:`images_at_once`.
    """
    for state in denoised_states(flow, images, labels, chunk=chunk):
        images = state
    return images
