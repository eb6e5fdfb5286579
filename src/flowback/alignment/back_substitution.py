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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flowback.compiled import load_library
from flowback.flow import affine
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
    """What a block's layers computed in one encode pass; made by :func:`recording`."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.layers = [cast(Layer, layer) for layer in block.body.layers]
        self.states: dict[nn.Module, Tensor] = {}
        """Inputs of norms and outputs of the linear layers after them, (b, n, ...) in the block's order."""

    @property
    def complete(self) -> bool:
        """Whether all is there, and nothing was narrowed (by autocast) or is elsewhere (sharded)."""
        tensors = [*self.states.values(), *self.block.parameters()]
        dtype = self.block.proj_in.weight.dtype
        return len(self.states) == 4 * len(self.layers) and all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == dtype for tensor in tensors
        )

    def solve(
        self,
        gradient: Float[Tensor, "b n d"],
        x: Float[Tensor, "b n d"],
        shift: Float[Tensor, "b n d"],
        log_scale: Float[Tensor, "b n d"],
    ) -> Float[Tensor, "b n d"]:
        """The u with u = g + N^T u; all in raster order.

        Args:
            gradient: g.
            x: the block's input.
            shift: what the block predicted.
            log_scale: likewise.
        """
        block, loaded = self.block, library()
        assert loaded is not None
        slope = affine.inverse_vjp(torch.ones_like(x), x, shift, log_scale)[2]  # of x by the log-scale
        slope = slope * affine.bounded_slope(log_scale, block.log_scale_bound)
        u, slope = (block.reorder(t).clone(memory_format=torch.contiguous_format) for t in (gradient, slope))
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


def _suits(block: Block, images: int) -> bool:
    """Whether the compiled code knows such a block, and pays.

    It reads the block's weights at every token. With fewer than two images a thread, that takes longer than
    some products over all tokens.
    """
    weight, body = block.proj_in.weight, block.body
    if weight.device.type != "cpu" or images < 2 * torch.get_num_threads() or library() is None:
        return False
    if body.checkpointing or body._compiled_call_impl is not None:  # its layers are called in other ways
        return False
    layers = [cast(Layer, layer) for layer in body.layers]
    plain = block.position is not None and all(
        isinstance(layer.mlp, MLP) and isinstance(layer.attention.q_norm, nn.Identity) for layer in layers
    )
    if not plain or weight.dtype not in (torch.float32, torch.float64):
        return False
    return all(size % (2 * _lanes(weight.dtype)) == 0 for size in layers[0].mlp.down.weight.shape)


@contextmanager
def recording(block: Block, images: int) -> Iterator[Encoding | None]:
    """Keep what the layers of a block compute inside, if the compiled code can solve with it.

    Autograd keeps the same tensors, so that this takes no memory.
    """
    if not _suits(block, images):
        yield None
        return
    encoding = Encoding(block)

    def keep_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        encoding.states[module] = inputs[0].detach()

    def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        encoding.states[module] = output.detach()

    with ExitStack() as hooks:
        for layer in encoding.layers:
            for norm, linear in ((layer.attention.norm, layer.attention.qkv), (layer.mlp.norm, layer.mlp.up)):
                hooks.callback(norm.register_forward_hook(keep_input).remove)
                hooks.callback(linear.register_forward_hook(keep_output).remove)
        yield encoding


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
