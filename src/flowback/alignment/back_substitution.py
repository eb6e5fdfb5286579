"""u = g + N^T u of one block, token by token from the last: exact, in compiled code on the CPU.

N^T is strictly upper triangular in the block's order, since a token depends on earlier ones alone. Back
substitution then needs one backward pass for the input, cut into tokens: as many operations as one product of
:func:`flowback.alignment.strategies.complete_series`. In PyTorch its thousands of small operations would cost
more than they save. ``back_substitution.cpp`` does it in one call.

Letters in shapes: b images, n tokens, d dimensions of a token, o and i outputs and inputs of a matrix.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flowback.compiled import load_library
from flowback.flow.block import Block
from flowback.nn.transformer import MLP, Layer

__all__ = ["Encoding", "library", "recording"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None if it is not available."""
    return load_library(
        Path(__file__).with_name("back_substitution.cpp"), "the fast exact reverse gradient", _declare
    )


def _declare(loaded: ctypes.CDLL) -> None:
    for solve in (loaded.solve_f32, loaded.solve_f64):
        solve.argtypes, solve.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    sizes = [loaded.layer_size(), loaded.model_size_f32(), loaded.model_size_f64()]
    if sizes != [ctypes.sizeof(kind) for kind in (_Layer, _model(ctypes.c_float), _model(ctypes.c_double))]:
        raise OSError("the library has structures of other sizes")


# Fields of back_substitution.cpp's structures, in its order.
_LAYER = ("qkv", "proj", "up", "down", "input", "qkv_out", "middle", "up_out", "gradient")
_NUMBERS = ("width", "heads", "hidden", "layers", "token_dim", "tokens", "images", "threads", "columns")
_POINTERS = ("in", "out", "slope", "layer", "down", "part", "wide", "token", "weight")


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _LAYER]


@functools.cache
def _model(number: Any) -> type[ctypes.Structure]:
    """The C structure of a block, for one type of floating-point number."""
    fields = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("eps", number),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]
    return type("_Model", (ctypes.Structure,), {"_fields_": fields})


class Encoding:
    """What a block's layers computed in one encode pass; filled by :func:`recording`."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.layers = [cast(Layer, layer) for layer in block.body.layers]
        self.states: dict[nn.Module, Tensor] = {}
        """Inputs of norms and outputs of the linear layers after them, (b, n, ...) in the block's order."""

    @property
    def suits(self) -> bool:
        """Whether the compiled code can solve with it: a plain block on the CPU, nothing narrowed."""
        dtype = self.block.proj_in.weight.dtype
        loaded = library()
        if loaded is None or dtype not in (torch.float32, torch.float64):
            return False
        panel = 2 * _lanes(dtype)
        return (
            all(isinstance(layer.mlp, MLP) for layer in self.layers)
            and all(isinstance(layer.attention.q_norm, nn.Identity) for layer in self.layers)
            and self.block.position is not None
            and all(size % panel == 0 for size in self.block.body.layers[0].mlp.down.weight.shape)
            and len(self.states) == 4 * len(self.layers)
            and all((state.dtype, state.device.type) == (dtype, "cpu") for state in self.states.values())
        )

    def solve(
        self, gradient: Float[Tensor, "b n d"], slope: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        """The u with u = g + N^T u, in raster order.

        Args:
            gradient: g.
            slope: derivative of each token by its raw log-scale, z held fixed.
        """
        block, loaded = self.block, library()
        assert loaded is not None
        u, slope = (
            block.reorder(values).clone(memory_format=torch.contiguous_format) for values in (gradient, slope)
        )
        b, n, d = u.shape
        width, threads = len(block.proj_in.weight), torch.get_num_threads()
        hidden = self.layers[0].mlp.down.in_features
        first, last = _packed(block.proj_in.weight), _packed(block.proj_out.weight)
        columns = first.shape[0] * first.shape[2]
        layers = [self._layer(layer) for layer in self.layers]
        scratch = [
            u.new_empty(b, size) for size in (width, width, max(3 * width, hidden, 2 * d), columns)
        ] + [u.new_empty(threads, 2 * n)]
        fields = (_Layer * len(layers))(*(_Layer(*(t.data_ptr() for t in layer)) for layer in layers))
        number = ctypes.c_double if u.dtype == torch.float64 else ctypes.c_float
        model = _model(number)(
            *(width, block.body.heads, hidden, len(layers), d, n, b, threads, columns),
            self.layers[0].attention.norm.eps,
            *(tensor.data_ptr() for tensor in (first, last, slope)),
            ctypes.addressof(fields),
            *(tensor.data_ptr() for tensor in scratch),
        )
        solve = loaded.solve_f64 if u.dtype == torch.float64 else loaded.solve_f32
        solve(ctypes.addressof(model), u.data_ptr())
        return block.reorder(u)

    def _layer(self, layer: Layer) -> tuple[Tensor, ...]:
        """The tensors of one layer, in the order of ``_LAYER``."""
        attention, mlp = layer.attention, cast(MLP, layer.mlp)
        parts = (attention.norm, attention.qkv, mlp.norm, mlp.up)
        states = [self.states[part].contiguous() for part in parts]
        b, n, width = states[0].shape
        return (
            _packed(attention.qkv.weight * attention.norm.weight),
            _packed(attention.proj.weight),
            _packed(mlp.up.weight * mlp.norm.weight),
            _packed(mlp.down.weight),
            *states,
            states[0].new_zeros(b, n, 2 * width),
        )


@contextmanager
def recording(block: Block) -> Iterator[Encoding]:
    """Keep what the block's layers compute inside; autograd keeps the same tensors: this takes no memory."""
    encoding = Encoding(block)

    def keep_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        encoding.states[module] = inputs[0].detach()

    def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        encoding.states[module] = output.detach()

    handles = []
    for layer in encoding.layers:
        for norm, linear in ((layer.attention.norm, layer.attention.qkv), (layer.mlp.norm, layer.mlp.up)):
            handles += [norm.register_forward_hook(keep_input), linear.register_forward_hook(keep_output)]
    try:
        yield encoding
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _packed(weight: Float[Tensor, "o i"]) -> Tensor:
    """(panels, o, columns of a panel): to multiply gradients of the outputs; filled up with zeros."""
    columns = 2 * _lanes(weight.dtype)
    weight = F.pad(weight.detach(), (0, -weight.shape[1] % columns))
    return weight.view(len(weight), -1, columns).transpose(0, 1).contiguous()


def _lanes(dtype: torch.dtype) -> int:
    """Numbers in a vector of the compiled code."""
    loaded = library()
    assert loaded is not None
    return loaded.lanes_f64() if dtype == torch.float64 else loaded.lanes_f32()
