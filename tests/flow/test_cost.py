"""Costs by formula are those of the model itself, to the last weight and the last product."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowback import Flow
from flowback.config import ModelConfig
from flowback.flow.cost import flops_per_image, parameters, training_bytes

SMALL = dict(image_size=8, channels=3, patch_size=2, width=32, blocks=3, layers=2, head_dim=8)  # noqa: C408
MODELS = {
    "tarflow": ModelConfig(**SMALL, num_classes=5),
    "unconditional": ModelConfig(**SMALL, num_classes=0, mlp_ratio=3),
    "rope-swiglu-qk-norm": ModelConfig(**SMALL, position="rope", mlp="swiglu", qk_norm=True),
    "range": ModelConfig(**SMALL, num_classes=5, noise="range"),
    "swiglu": ModelConfig(**SMALL, mlp="swiglu", num_classes=2),
    "uneven": ModelConfig(**SMALL | {"layers": (1, 1, 4)}, num_classes=2),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parameters_are_those_of_the_whole_model(model):
    assert parameters(model) == sum(weights.numel() for weights in Flow(model).parameters())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_operations_are_those_of_an_encode_pass(model):
    """The counter sees the whole matrix of scores, of which causal attention needs (n + 1)/2n."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        Flow(model)(torch.zeros(1, 3, 8, 8), None, noise=0.3 if model.noise == "range" else None)
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    scores = counts.pop("aten.bmm")
    n = model.tokens
    assert scores == sum(model.depths) * 4 * n * n * model.width
    assert flops_per_image(model) == sum(counts.values()) + scores * (n + 1) // (2 * n)


def test_memory_counts_the_layers_of_all_blocks():
    """Of one total, wherever the layers are."""
    even, uneven = (ModelConfig(**SMALL | {"layers": layers}, num_classes=2) for layers in (2, (1, 1, 4)))
    more = ModelConfig(**SMALL | {"layers": (1, 1, 5)}, num_classes=2)
    assert training_bytes(even, 3, "fp32") == training_bytes(uneven, 3, "fp32")
    # Bytes of 12 values of the width and the MLP's 4 hidden ones twice, for each token of three images.
    activations = 4 * (12 + 2 * 4) * 32 * 16 * 3
    weights = 5 * 4 * (parameters(more) - parameters(uneven))
    assert training_bytes(more, 3, "fp32") - training_bytes(uneven, 3, "fp32") == activations + weights
