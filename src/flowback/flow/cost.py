"""Parameters, FLOPs and memory of a model, from its settings alone."""

from __future__ import annotations

from flowback.config import ModelConfig

__all__ = ["H100_FLOPS", "flops_per_image", "parameters", "training_bytes", "training_days"]

H100_FLOPS = 989e12
"""Dense bf16 operations a second of one NVIDIA H100 SXM, by its data sheet."""


def _mlp(model: ModelConfig) -> tuple[int, int]:
    """Outputs of the MLP's first matrix, and inputs of its second."""
    hidden = model.mlp_ratio * model.width
    if model.mlp == "swiglu":
        hidden = round(hidden * 2 / 3 / 8) * 8
        return 2 * hidden, hidden
    return hidden, hidden


def _layer_weights(model: ModelConfig) -> int:
    """Weights in the matrices of one Transformer layer: attention and MLP."""
    return 4 * model.width**2 + model.width * sum(_mlp(model))


def parameters(model: ModelConfig) -> int:
    """Number of weights of the flow, without building it."""
    w, d = model.width, model.token_dim
    biases = 4 * w + _mlp(model)[0] + w  # q, k, v and the attention's output; the MLP
    norms = 2 * 2 * w + (2 * model.head_dim if model.qk_norm else 0)
    layer = _layer_weights(model) + biases + norms
    ends = (d * w + w) + (w * 2 * d + 2 * d)  # tokens in; shift and log-scale out
    tables = w * (model.num_classes or 0) + (w * model.tokens if model.position == "learned" else 0)
    levels = 8 * w**2 + 5 * w if model.noise == "range" else 0  # w → 4w → w
    return sum(model.depths) * layer + model.blocks * (ends + tables + levels)


def flops_per_image(model: ModelConfig) -> int:
    """Floating-point operations of one encode pass of one image (a multiply-add counts two).

    Matrix products and causal attention (half of the score matrix); a training step takes
    three times as much.
    """
    n, w, d = model.tokens, model.width, model.token_dim
    attention = 2 * 2 * w * n * (n + 1) // 2  # scores and weighted sum, each 2·w per pair
    layer = 2 * n * _layer_weights(model) + attention
    levels = 2 * 8 * w**2 if model.noise == "range" else 0  # once an image, not for each token
    return sum(model.depths) * layer + model.blocks * (2 * n * w * (d + 2 * d) + levels)


def training_bytes(model: ModelConfig, batch: int, precision: str, checkpointing: bool = False) -> int:
    """Estimated memory of a training step: fp32 weights, gradients, two moments, average, activations.

    For each token and layer autograd keeps, in the autocast dtype, 12 values of the width (two norms and what
    goes into them, q, k, v, the attention's output twice, and gradients on their way) and the MLP's hidden
    values: GELU's before and after it; of SwiGLU both halves, the gate after its SiLU, and the product.
    Alignment is not counted; exact reverse took 1.2 times as much.

    Args:
        model: the flow.
        batch: images at once.
        precision: `fp32` or `bf16`.
        checkpointing: only the input of each layer is kept, and all of a single one.
    """
    hidden = sum(_mlp(model)) * 4 / 3 if model.mlp == "swiglu" else sum(_mlp(model))
    layer, layers = 12 * model.width + round(hidden), sum(model.depths)
    kept = layers * model.width + layer if checkpointing else layers * layer
    return 5 * 4 * parameters(model) + kept * model.tokens * batch * (2 if precision == "bf16" else 4)


def training_days(model: ModelConfig, images: int, utilisation: float) -> float:
    """Days on one H100 that does ``utilisation`` of :data:`H100_FLOPS`, for a training on so many images.

    Of the flow alone, forward and backward; alignment adds its encoder and its part of the flow.
    """
    return 3 * flops_per_image(model) * images / (H100_FLOPS * utilisation) / 86_400
