"""A flow whose weights are constants of autograd, for gradients by images or labels alone.

No gradient of a weight is computed, and what only such gradients need is not kept after the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import functional_call

from flowback.flow.tarflow import FlowOutput, TARFlow

__all__ = ["constant", "frozen"]


def frozen(flow: TARFlow) -> Callable[..., FlowOutput]:
    """The flow's encode pass with its present weights as constants; it takes the flow's own arguments."""
    weights = {name: constant(tensor) for name, tensor in (*flow.named_parameters(), *flow.named_buffers())}

    def encode(*arguments: object, **options: object) -> FlowOutput:
        output: FlowOutput = functional_call(flow, weights, arguments, options)
        return output

    return encode


def constant(tensor: Tensor) -> Tensor:
    """A constant for autograd, which refuses tensors made in inference mode but takes copies of them."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
