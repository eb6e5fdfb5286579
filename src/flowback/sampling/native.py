"""The compiled decode step: calls ``decode.cpp``, which :mod:`flowback.compiled` builds.

Where it is not available, :func:`library` is None and PyTorch decodes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flowback.compiled import load_library
from flowback.flow import affine
from flowback.flow.block import Block
from flowback.nn.transformer import Layer

__all__ = ["NativeCache", "NativeStep", "NativeWeights", "last_cache", "library"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None if it is not available."""
    return load_library(Path(__file__).with_name("decode.cpp"), "the fast decoder", _declare)


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in _STEPS.values():
        step = getattr(loaded, name)
        step.argtypes = [pointer, pointer, pointer, number, number, number, pointer, number]
        step.restype = None
    sizes = [loaded.layer_size(), loaded.model_size_f32(), loaded.model_size_f64()]
    if sizes != [ctypes.sizeof(kind) for kind in (_Layer, _model(ctypes.c_float), _model(ctypes.c_double))]:
        raise OSError("the library has structures of other sizes")


_STEPS = {
    (torch.float32, torch.float32): "step_f32",
    (torch.float64, torch.float64): "step_f64",
    (torch.float32, torch.bfloat16): "step_bf16",
}
"""Functions for (dtype of the arithmetic, dtype of weights, keys and values)."""

# Fields of decode.cpp's structures, in its order.
_LAYER = (
    *("qkv", "proj", "up", "down", "qkv_bias", "proj_bias", "up_bias", "down_bias"),
    *("q_norm", "k_norm", "keys", "values"),
)
_NUMBERS = ("width", "heads", "hidden", "layers", "token_dim", "tokens", "gated", "threads")
_POINTERS = (
    *("in", "out", "out_bias", "place", "context", "cos", "sin", "scale"),
    *("layer", "x", "norm", "wide", "mixed", "score"),
)


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _LAYER]


@functools.cache
def _model(number: Any) -> type[ctypes.Structure]:
    """The C structure of a block, for one type of floating-point number."""
    fields = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, number) for name in ("eps", "qk_eps")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]
    return type("_Model", (ctypes.Structure,), {"_fields_": fields})


class NativeWeights:
    """A block's weights as the compiled step reads them.

    Matrices lie in panels of two vectors of columns; scale and shift of a LayerNorm are folded into the
    matrix that follows: W(s·x + t) + b = (W·s)x + (Wt + b).
    """

    def __init__(self, block: Block, storage: torch.dtype) -> None:
        self.storage, self.dtype = storage, block.proj_in.weight.dtype
        self.lanes = _lanes(self.dtype)
        layers = [cast(Layer, layer) for layer in block.body.layers]
        self.width, self.token_dim = block.proj_in.weight.shape
        self.heads, self.head_dim = block.body.heads, block.body.head_dim
        self.hidden, self.up = layers[0].mlp.down.in_features, layers[0].mlp.up.out_features
        self.eps = layers[0].attention.norm.eps
        self.qk_eps = _epsilon(layers[0].attention.q_norm, self.dtype)
        position = block.position
        self.tokens = len(block.rotary_cos if position is None else position)
        place = block.proj_in.bias.expand(self.tokens, -1)
        if position is not None:
            place = place + block.reorder(position, dim=0)
        self.place = place.detach().contiguous()
        self.rotary: tuple[Tensor | None, Tensor | None] = (None, None)
        if position is None:
            self.rotary = (block.rotary_cos.to(self.dtype), block.rotary_sin.to(self.dtype))
        self.input = self._pack(block.proj_in.weight)
        self.output = self._pack(block.proj_out.weight)
        self.columns = self.output.shape[0] * self.output.shape[2]
        bias = block.proj_out.bias.detach()
        self.output_bias = F.pad(bias, (0, self.columns - len(bias)))
        self.layers = [self._layer(layer) for layer in layers]
        self.log_scale_bound = block.log_scale_bound

    def _layer(self, layer: Layer) -> tuple[Tensor | None, ...]:
        """The tensors of one layer, in the order of ``_LAYER``."""
        attention, mlp = layer.attention, layer.mlp
        qkv, qkv_bias = self._folded(attention.norm, attention.qkv)
        up, up_bias = self._folded(mlp.norm, mlp.up)
        proj, down = self._pack(attention.proj.weight), self._pack(mlp.down.weight)
        norms = (getattr(norm, "weight", None) for norm in (attention.q_norm, attention.k_norm))
        biases = (qkv_bias, attention.proj.bias.detach(), up_bias, mlp.down.bias.detach())
        return (qkv, proj, up, down, *biases, *norms)

    @staticmethod
    def suits(block: Block, storage: torch.dtype) -> bool:
        """Whether the compiled step can decode this block."""
        weight = block.proj_in.weight
        if weight.device.type != "cpu" or (weight.dtype, storage) not in _STEPS or library() is None:
            return False
        lanes = _lanes(weight.dtype)
        sizes = (len(weight), *(cast(Layer, layer).mlp.up.out_features for layer in block.body.layers))
        return all(size % (2 * lanes) == 0 for size in sizes) and block.body.head_dim % lanes == 0

    def _pack(self, weight: Float[Tensor, "o i"]) -> Tensor:
        """(panels, inputs, columns of a panel), in the storage dtype, filled up with zeros."""
        columns = 2 * self.lanes
        weight = F.pad(weight.detach(), (0, 0, 0, -len(weight) % columns))
        return weight.view(-1, columns, weight.shape[1]).transpose(1, 2).to(self.storage).contiguous()

    def _folded(self, norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        bias = (linear.bias + linear.weight @ norm.bias).detach()
        return self._pack(linear.weight * norm.weight), bias


@dataclass(frozen=True)
class NativeCache:
    """Keys, values and scratch for so many rows and new tokens; one after another, all blocks use it."""

    keys: Tensor
    values: Tensor
    scratch: tuple[Tensor, ...]
    tokens: Tensor
    """Input of a step."""
    out: Tensor
    """Output of a step."""
    rows: int
    """Sequences that it has room for."""
    new: int
    """Most tokens of each in a step."""

    @classmethod
    def empty(cls, weights: NativeWeights, rows: int, new: int, layers: int | None = None) -> NativeCache:
        """Room for ``rows`` sequences and at most ``new`` tokens of each in a step.

        Args:
            weights: of one of the blocks that use it.
            rows: sequences.
            new: tokens.
            layers: of the deepest of these blocks; None: of this one.
        """
        block, layers = weights.lanes, layers or len(weights.layers)
        sizes = (weights.width, weights.width, max(3 * weights.width, weights.up), weights.width)
        like = weights.place
        stored = like.new_empty(0, dtype=weights.storage)
        heads = (layers, rows, weights.heads)
        return cls(
            _on_large_pages(stored.new_empty(*heads, -(-weights.tokens // block), weights.head_dim, block)),
            _on_large_pages(stored.new_empty(*heads, weights.tokens, weights.head_dim)),
            (
                *(like.new_empty(rows * new, size) for size in sizes),
                like.new_empty(torch.get_num_threads(), -(-weights.tokens // 64) * 64),
            ),
            like.new_empty(rows * new, weights.token_dim),
            like.new_empty(rows * new, weights.columns),
            rows,
            new,
        )


class NativeStep:
    """The predictions of one block, computed by the compiled step.

    Args:
        weights: of the block.
        cache: of at least as many rows; overwritten.
        context: the embedding of each row's label.
        scale: factor of each row's attention scores.

    Raises:
        ValueError: context, scale or cache do not fit each other. The compiled code itself looks at nothing.
    """

    def __init__(
        self,
        weights: NativeWeights,
        cache: NativeCache,
        context: Float[Tensor, "r w"] | None,
        scale: Float[Tensor, " r"],
    ) -> None:
        loaded = library()
        assert loaded is not None
        self.rows, self.limit, self.dtype = len(scale), weights.tokens, weights.dtype
        fits = context is None or (context.shape, context.dtype) == ((self.rows, weights.width), self.dtype)
        room = self.rows <= cache.rows and len(weights.layers) <= len(cache.keys)
        if not room or scale.dtype != self.dtype or not fits:
            raise ValueError("Cache, context and scale do not fit the weights or each other.")
        number = ctypes.c_double if weights.dtype == torch.float64 else ctypes.c_float
        self.function = getattr(loaded, _STEPS[weights.dtype, weights.storage])
        self.cache, self.columns, self.dim = cache, weights.columns, weights.token_dim
        self.log_scale_bound = weights.log_scale_bound
        caches = zip(weights.layers, cache.keys, cache.values, strict=False)  # the cache may be deeper
        layers = [_Layer(*map(_address, (*layer, keys, values))) for layer, keys, values in caches]
        self.layers = (_Layer * len(layers))(*layers)
        # The structure holds bare addresses: the tensors must live as long as it does.
        self.kept = (weights, cache, None if context is None else context.contiguous(), scale.contiguous())
        weighty = (weights.input, weights.output, weights.output_bias, weights.place)
        self.model = _model(number)(
            *(weights.width, weights.heads, weights.hidden, len(layers), weights.token_dim, weights.tokens),
            *(weights.up != weights.hidden, len(cache.scratch[-1]), weights.eps, weights.qk_eps),
            *map(_address, (*weighty, self.kept[2], *weights.rotary, self.kept[3])),
            ctypes.addressof(self.layers),
            *map(_address, cache.scratch),
        )
        self.views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.checked: Tensor | None = None
        self.pointers = (ctypes.addressof(self.model), _address(cache.tokens), _address(cache.out))

    def __call__(
        self, x: Float[Tensor, "b n d"], start: int, which: Int[Tensor, " r"]
    ) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        """Shift and log-scale of the tokens that follow the given ones of the rows ``which``.

        The results are views of a buffer that the next call overwrites.

        Args:
            x: the tokens of each row, or of each image where the rows are the streams of these images.
            start: place of the first token.
            which: rows of the cache.

        Raises:
            ValueError: tokens or rows that are not there, or tokens of another dtype or shape.
        """
        rows, n = len(which), x.shape[1]
        problem = self._problem(x, start, which)
        if problem:
            raise ValueError(f"The compiled decode step refuses {problem}.")
        if (rows, n) not in self.views:
            made = self.cache.out[: rows * n].view(rows, n, self.columns)
            tokens = self.cache.tokens[: rows * n].view(-1, *x.shape)
            self.views[rows, n] = tokens, made[..., self.dim : 2 * self.dim], made[..., : self.dim]
        tokens, shift, log_scale = self.views[rows, n]
        tokens.copy_(x)
        model, tokens_address, out = self.pointers
        self.function(model, tokens_address, which.data_ptr(), rows, n, start, out, self.columns)
        return shift, affine.bounded(log_scale, self.log_scale_bound)

    def _problem(self, x: Tensor, start: int, which: Tensor) -> str | None:
        """What is wrong with a call. The compiled code itself would read and write outside of its buffers."""
        rows, n = len(which), x.shape[1]
        if start < 0 or start + n > self.limit:
            return f"tokens {start} ... {start + n - 1}: there are {self.limit}"
        if rows * n > len(self.cache.out):
            return f"{n} tokens of {rows} rows: there is room for {len(self.cache.out)} in all"
        if len(x) not in (rows, rows / 2):
            return f"tokens of {len(x)} images for {rows} rows"
        if x.shape[2] != self.dim or x.dtype != self.dtype:
            return f"tokens of {x.shape[2]} dimensions in {x.dtype}: it takes {self.dim} in {self.dtype}"
        if which is not self.checked:  # looking at its values takes as long as a step of a small model
            if which.dtype != torch.int64 or not which.is_contiguous():
                return f"rows in {which.dtype}: it takes contiguous int64"
            if rows and not 0 <= int(which.min()) <= int(which.max()) < self.rows:
                return f"rows {which.tolist()}: there are {self.rows}"
            self.checked = which
        return None


def last_cache() -> int:
    """Bytes of the processor's last cache; 0 where Linux does not say."""
    try:
        sizes = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max((1024 * int(size.strip().removesuffix("K")) for size in sizes), default=0)
    except (OSError, ValueError):
        return 0


def _on_large_pages(tensor: Tensor) -> Tensor:
    """Ask Linux for pages of 2 MiB: the cache is read at the speed of memory, a third faster on them."""
    page = 2**21
    first = -(-tensor.data_ptr() // page) * page
    size = tensor.data_ptr() + tensor.nbytes - first
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= page:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(first, size // page * page, mmap.MADV_HUGEPAGE)  # a wish: it may be refused
    return tensor


def _lanes(dtype: torch.dtype) -> int:
    """Numbers in a vector of the compiled step."""
    loaded = library()
    assert loaded is not None
    return loaded.lanes_f64() if dtype == torch.float64 else loaded.lanes_f32()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _epsilon(norm: nn.Module, dtype: torch.dtype) -> float:
    """The RMS norm's epsilon; PyTorch's default is that of the dtype."""
    epsilon = getattr(norm, "eps", None)
    return torch.finfo(dtype).eps if epsilon is None else epsilon
