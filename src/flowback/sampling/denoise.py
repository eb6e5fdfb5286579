"""One denoising step with the flow's own score (TARFlow, arXiv 2412.06329, Sec. 2.4).

The flow models images with Gaussian noise on them. By Tweedie's formula the mean of the clean image given
the noisy one is x + σ²·∇ log p(x): one forward and one backward pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.levels import UserLevels

__all__ = ["denoise", "denoises", "images_at_once"]

_BUDGET = 2**30
"""Bytes of activations that one denoising pass may hold."""
_ACTIVATIONS = 24
"""Tensors of the size (tokens, width) that autograd keeps in one layer, about."""


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
    """The denoised images, x + σ²·∇ log p(x | label), σ the noise of training, or the given level of it.

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
    chunk = chunk or images_at_once(flow)
    levels = flow.levels(noise, len(images))
    clean = []
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        # Tensors made in inference mode cannot have gradients; their copies can.
        with torch.inference_mode(False), torch.enable_grad():
            part_labels = None if labels is None else labels[part].clone()
            x = images[part].detach().clone().requires_grad_()
            part_levels = None if levels is None else levels[part].clone()
            log_prob = flow(x, part_labels, noise=part_levels).log_prob
            (score,) = torch.autograd.grad(log_prob.sum(), x)
            if part_levels is None:
                clean.append(torch.add(x.detach(), score, alpha=flow.config.noise_std**2))
            else:
                clean.append(torch.addcmul(x.detach(), score, part_levels.square()[:, None, None, None]))
    return torch.cat(clean) if clean else images
