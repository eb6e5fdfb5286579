"""Parameters, FLOPs and memory of a model, from its settings alone."""

from __future__ import annotations

from functools import lru_cache

import torch

from flowback.config import ModelConfig
from flowback.flow.tarflow import Flow

__all__ = ["H100_FLOPS", "flops_per_image", "parameters", "training_bytes", "training_days"]

H100_FLOPS = 989e12
"""Dense bf16 operations a second of one NVIDIA H100 SXM, by its data sheet."""


def _layer_weights(model: ModelConfig) -> int:
    """Weights in the matrices of one Transformer layer: attention and MLP."""
    w = model.width
    hidden = model.mlp_ratio * w
    if model.mlp == "swiglu":
        return 4 * w * w + 3 * w * (round(hidden * 2 / 3 / 8) * 8)
    return 4 * w * w + 2 * w * hidden


@lru_cache(maxsize=128)
def parameters(model: ModelConfig) -> int:
    """Number of weights of the flow.

    Counted on the meta device, so that the largest preset costs nothing.
    """
    with torch.device("meta"):
        return sum(p.numel() for p in Flow(model).parameters())


def flops_per_image(model: ModelConfig) -> int:
    """Floating-point operations of one encode pass of one image (a multiply-add counts two).

    Matrix products and causal attention (half of the score matrix); a training step takes
    three times as much.
    """
    n, w, d = model.tokens, model.width, model.token_dim
    attention = 2 * 2 * w * n * (n + 1) // 2  # scores and weighted sum, each 2·w per pair
    layer = 2 * n * _layer_weights(model) + attention
    return model.blocks * (model.layers * layer + 2 * n * w * (d + 2 * d))


def training_bytes(model: ModelConfig, batch: int, precision: str) -> int:
    """Estimated memory of a training step: fp32 weights, gradients, two moments, average, activations.

    Activations count as 16 values of the width for each token and layer, in the autocast dtype: what autograd
    keeps of two norms, q, k, v, the attention's output and the MLP's hidden values before and after GELU.
    """
    values = 16 * model.width * model.tokens * model.layers * model.blocks * batch
    return 5 * 4 * parameters(model) + values * (2 if precision == "bf16" else 4)


def training_days(model: ModelConfig, images: int, utilisation: float) -> float:
    """Days on one H100 that does ``utilisation`` of :data:`H100_FLOPS`, for a training on so many images.

    Of the flow alone, forward and backward; alignment adds its encoder and its part of the flow.
    """
    return 3 * flops_per_image(model) * images / (H100_FLOPS * utilisation) / 86_400
