"""A Transformer: tokens to tokens, and the hidden states of chosen layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowback.nn.attention import Attention, KVCache, Rotary

__all__ = ["MLP", "Layer", "SwiGLU", "Transformer"]


class MLP(nn.Module):
    """Pre-normalised two-layer perceptron with the exact GELU."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        inside = self.up(self.norm(x))
        # Under torch.func's transforms, which differentiate and batch as they like, PyTorch's own layers run.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            return _gelu_linear(inside, self.down.weight, self.down.bias)
        return self.down(F.gelu(inside))


def _gelu_linear(
    x: Float[Tensor, "b n h"], weight: Float[Tensor, "w h"], bias: Float[Tensor, " w"]
) -> Float[Tensor, "b n w"]:
    """linear(gelu(x)) that keeps x alone for the gradient, and computes the GELU again there.

    The GELU's output is a quarter of all that a layer would keep, and 2 % of its time. The input and the
    weights have a node each, so that a backward pass for the input alone skips the weights' products, as it
    does in PyTorch's own layers: a single Function is not told what the pass wants. The input's gradient can
    be differentiated again, by input and weights; the weights' gradient cannot, and says so.
    """
    output: Tensor = _GeluLinear.apply(x, weight, bias)
    nothing: Tensor = _GeluLinearWeights.apply(x.detach(), weight, bias, output.detach())
    return output + nothing


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)), differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is None:  # what no loss reaches stays without a gradient
            return None, None, None
        x, weight = ctx.saved_tensors  # under autocast the gradient's dtype is not the weight's
        inside = (gradient @ weight.to(gradient.dtype)).to(x.dtype)
        return torch.ops.aten.gelu_backward(inside, x), None, None


class _GeluLinearWeights(torch.autograd.Function):
    """Zeros of the shape of ``output``, with the gradient that weight and bias have in linear(gelu(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, output: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.dtype = weight.dtype
        return output.new_zeros(()).expand_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, Tensor | None, Tensor | None, None]:
        if gradient is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # in a backward pass: create_graph=True
            raise RuntimeError(
                "The gradient of a flow's weights cannot be differentiated again (create_graph=True); "
                "take such second derivatives with torch.func (grad, jacrev)."
            )
        (x,) = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            d_weight = (rows.T @ F.gelu(x).to(rows.dtype).flatten(0, -2)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0, dtype=ctx.dtype)
        return None, d_weight, d_bias, None


class SwiGLU(nn.Module):
    """Pre-normalised gated perceptron (arXiv 2002.05202); 2/3 of the hidden width: the parameters of MLP."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        hidden = round(ratio * width * 2 / 3 / 8) * 8
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(
        self, width: int, head_dim: int, mlp: str, ratio: int, qk_norm: bool, causal: bool = True
    ) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim, qk_norm, causal)
        self.mlp = (SwiGLU if mlp == "swiglu" else MLP)(width, ratio)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        rotary: Rotary | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int | Tensor = 0,
        temperature: float | Tensor = 1.0,
    ) -> Float[Tensor, "b n w"]:
        x = x + self.attention(x, rotary, cache, start, temperature)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """A stack of layers, causal or not; arguments as in :class:`~flowback.nn.attention.Attention`."""

    def __init__(
        self,
        width: int,
        layers: int,
        head_dim: int,
        mlp: str = "gelu",
        ratio: int = 4,
        qk_norm: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(width, head_dim, mlp, ratio, qk_norm, causal) for _ in range(layers)
        )
        self.heads, self.head_dim = width // head_dim, head_dim
        self.checkpointing = False
        """Keep the input of each layer only, and compute the layer again for the gradient."""

    def empty_cache(self, batch: int, tokens: int, like: Tensor) -> KVCache:
        """Room for the keys and values of ``tokens`` tokens of ``batch`` sequences."""
        return KVCache.empty(len(self.layers), batch, self.heads, tokens, self.head_dim, like)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        rotary: Rotary | None = None,
        cache: KVCache | None = None,
        start: int | Tensor = 0,
        temperature: float | Tensor = 1.0,
        hidden: Collection[int] = (),
    ) -> tuple[Float[Tensor, "b n w"], dict[int, Tensor]]:
        """Output tokens, and the outputs of the layers named in ``hidden`` (counted from 1)."""
        states: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            own = None if cache is None else (cache.keys[index], cache.values[index])
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, rotary, None, start, temperature, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, rotary, own, start, temperature)
            if index + 1 in hidden:
                states[index + 1] = x
        return x, states
