"""The compiled step of a Transformer: calls ``decode.cpp``, which :mod:`flowback.compiled` builds.

Where it is not available, :func:`library` is None and PyTorch decodes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flowback.compiled import load_library
from flowback.flow.block import Block
from flowback.nn.attention import Rotary
from flowback.nn.transformer import Layer, Transformer

__all__ = ["NativeCache", "NativeStep", "NativeWeights", "Parts", "last_cache", "library"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None if it is not available."""
    return load_library(Path(__file__).with_name("decode.cpp"), "the fast decoder", _declare)


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for (dtype, *_), name in _NAMES.items():
        step, decode = getattr(loaded, f"step_{name}"), getattr(loaded, f"decode_{name}")
        step.argtypes = [pointer, pointer, pointer, number, number, number, pointer, number]
        images = [*([pointer] * 3), _number(dtype)]
        decode.argtypes = [pointer, pointer, number, number, number, *images, pointer, pointer, number]
        step.restype = decode.restype = None
    sizes = [loaded.layer_size(), loaded.model_size_f32(), loaded.model_size_f64()]
    if sizes != [ctypes.sizeof(kind) for kind in (_Layer, _model(ctypes.c_float), _model(ctypes.c_double))]:
        raise OSError("the library has structures of other sizes")


_NAMES = {
    (torch.float32, torch.float32, torch.float32): "f32",
    (torch.float64, torch.float64, torch.float64): "f64",
    (torch.float32, torch.bfloat16, torch.bfloat16): "bf16",
    (torch.float32, torch.float32, torch.bfloat16): "f32_bf16",
}
"""Of the functions, by the dtypes of the arithmetic, the weights, and the keys and values."""

_TOGETHER = 16
"""Tokens decoded in one call, between which Ctrl-C is heard."""


def _number(dtype: torch.dtype) -> Any:
    return ctypes.c_double if dtype == torch.float64 else ctypes.c_float


# Fields of decode.cpp's structures, in its order.
_LAYER = (
    *("qkv", "proj", "up", "down", "qkv_bias", "proj_bias", "up_bias", "down_bias"),
    *("q_norm", "k_norm", "context", "keys", "values"),
)
_NUMBERS = (
    *("width", "heads", "hidden", "layers", "token_dim", "tokens"),
    *("gated", "causal", "final_norm", "threads"),
)
_POINTERS = (
    *("in", "out", "out_bias", "place", "cos", "sin", "scale"),
    "layer",
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


@dataclass(frozen=True)
class Parts:
    """What the compiled step runs: tokens into a Transformer and out of it."""

    proj_in: nn.Linear
    bodies: Sequence[Transformer]
    """Whose layers follow one another."""
    proj_out: nn.Linear
    position: Float[Tensor, "n w"] | None
    """What is added to the tokens, in their order."""
    rotary: Rotary | None = None
    """Of the tokens, in their order, where ``position`` is None."""
    norm: nn.LayerNorm | None = None
    """Before ``proj_out``."""
    causal: bool = True
    """Whether tokens see only those before them; otherwise each call holds all of them."""

    @classmethod
    def of_block(cls, block: Block) -> Parts:
        """Those of a flow's block."""
        position = None if block.position is None else block.reorder(block.position, dim=0)
        rotary = Rotary(block.rotary_cos, block.rotary_sin) if position is None else None
        return cls(block.proj_in, [block.body], block.proj_out, position, rotary)

    @property
    def layers(self) -> list[Layer]:
        """Those of all bodies."""
        return [cast(Layer, layer) for body in self.bodies for layer in body.layers]


class NativeWeights:
    """Weights as the compiled step reads them.

    Matrices lie in panels of two vectors of columns; scale and shift of a LayerNorm are folded into the
    matrix that follows: W(s·x + t) + b = (W·s)x + (Wt + b).

    Args:
        parts: what has the weights.
        storage: dtype that matrices are kept in.
    """

    def __init__(self, parts: Parts, storage: torch.dtype) -> None:
        self.storage, self.dtype = storage, parts.proj_in.weight.dtype
        self.lanes = _lanes(self.dtype)
        layers = parts.layers
        self.width, self.token_dim = parts.proj_in.weight.shape
        self.heads, self.head_dim = parts.bodies[0].heads, parts.bodies[0].head_dim
        self.causal, self.final_norm = parts.causal, parts.norm is not None
        hidden, up = layers[0].mlp.down.in_features, layers[0].mlp.up.out_features
        self.gated, self.hidden = up != hidden, hidden + -hidden % (2 * self.lanes)
        self.eps = layers[0].attention.norm.eps
        self.qk_eps = _epsilon(layers[0].attention.q_norm, self.dtype)
        place: Tensor = parts.proj_in.bias
        if parts.position is not None:
            place = place + parts.position
        self.rotary: tuple[Tensor | None, Tensor | None] = (None, None)
        if parts.rotary is not None:
            self.rotary = (parts.rotary.cos.to(self.dtype), parts.rotary.sin.to(self.dtype))
            place = place.expand(len(parts.rotary.cos), -1)
        self.place = place.detach().contiguous()
        self.tokens = len(self.place)
        self.input = self._pack(parts.proj_in.weight)
        if parts.norm is None:
            self.output, bias = self._pack(parts.proj_out.weight), parts.proj_out.bias.detach()
        else:
            self.output, bias = self._folded(parts.norm, parts.proj_out)
        self.columns = self.output.shape[0] * self.output.shape[2]
        self.output_bias = F.pad(bias, (0, self.columns - len(bias)))
        self.layers = [self._layer(layer) for layer in layers]

    def _layer(self, layer: Layer) -> tuple[Tensor | None, ...]:
        """The tensors of one layer, in the order of ``_LAYER``."""
        attention, mlp = layer.attention, layer.mlp
        qkv, qkv_bias = self._folded(attention.norm, attention.qkv)
        up, up_bias = self._folded(mlp.norm, mlp.up, 2 if self.gated else 1)
        extra = self.hidden - mlp.down.in_features
        proj, down = self._pack(attention.proj.weight), self._pack(F.pad(mlp.down.weight, (0, extra)))
        norms = (getattr(norm, "weight", None) for norm in (attention.q_norm, attention.k_norm))
        biases = (qkv_bias, attention.proj.bias.detach(), up_bias, mlp.down.bias.detach())
        return (qkv, proj, up, down, *biases, *norms)

    @property
    def cached_layers(self) -> int:
        """Layers with keys and values of their own: all, or one for all where each call holds all tokens."""
        return len(self.layers) if self.causal else 1

    @staticmethod
    def suits(parts: Parts, storage: torch.dtype) -> bool:
        """Whether the compiled step can run this."""
        weight = parts.proj_in.weight
        if weight.device.type != "cpu" or (weight.dtype, storage, storage) not in _NAMES or library() is None:
            return False
        lanes = _lanes(weight.dtype)
        return len(weight) % (2 * lanes) == 0 and parts.bodies[0].head_dim % lanes == 0

    def _pack(self, weight: Float[Tensor, "o i"]) -> Tensor:
        """(panels, inputs, columns of a panel), in the storage dtype, filled up with zeros."""
        columns = 2 * self.lanes
        weight = F.pad(weight.detach(), (0, 0, 0, -len(weight) % columns))
        return weight.view(-1, columns, weight.shape[1]).transpose(1, 2).to(self.storage).contiguous()

    def _folded(self, norm: nn.LayerNorm, linear: nn.Linear, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Matrix and bias that take in the norm's; each of so many parts of the columns has whole panels."""
        bias = (linear.bias + linear.weight @ norm.bias).detach().chunk(parts)
        weight = (linear.weight * norm.weight).chunk(parts)
        extra = (0, -len(bias[0]) % (2 * self.lanes))
        return torch.cat([self._pack(w) for w in weight]), torch.cat([F.pad(b, extra) for b in bias])


@dataclass(frozen=True)
class NativeCache:
    """Keys and values of so many rows, and room for new tokens; one after another, all blocks use it."""

    keys: Tensor
    values: Tensor
    tokens: Tensor
    """Input of a step."""
    out: Tensor
    """Output of a step."""
    rows: int
    """Sequences that it has room for."""
    new: int
    """Most tokens of each in a step."""

    @classmethod
    def empty(
        cls,
        weights: NativeWeights,
        rows: int,
        new: int,
        layers: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> NativeCache:
        """Room for ``rows`` sequences and at most ``new`` tokens of each in a step.

        Args:
            weights: of one of the blocks that use it.
            rows: sequences.
            new: tokens.
            layers: of the deepest of these blocks; None: of this one.
            dtype: of keys and values; None: that of the matrices.
        """
        block, layers = weights.lanes, layers or weights.cached_layers
        like = weights.place
        stored = like.new_empty(0, dtype=dtype or weights.storage)
        heads = (layers, rows, weights.heads)
        keys = _on_large_pages(stored.new_empty(*heads, -(-weights.tokens // block), weights.head_dim, block))
        return cls(
            keys.zero_(),  # vectors of tokens reach beyond the last one; denormal numbers there would be slow
            _on_large_pages(stored.new_empty(*heads, weights.tokens, weights.head_dim)),
            like.new_empty(rows * new, weights.token_dim),
            like.new_empty(rows * new, weights.columns),
            rows,
            new,
        )


class NativeStep:
    """Some rows of a batch through the compiled step.

    Args:
        weights: of the model.
        cache: of at least as many rows; overwritten.
        contexts: by the layer, counted from 0, what is added to the tokens of each row before it.
        scale: factor of each row's attention scores.

    Raises:
        ValueError: contexts, scale or cache do not fit each other. The compiled code itself looks at nothing.
    """

    def __init__(
        self,
        weights: NativeWeights,
        cache: NativeCache,
        contexts: Mapping[int, Float[Tensor, "r w"]],
        scale: Float[Tensor, " r"],
    ) -> None:
        loaded = library()
        assert loaded is not None
        self.rows, self.limit, self.dtype = len(scale), weights.tokens, weights.dtype
        self.causal = weights.causal
        layers = len(weights.layers)
        fits = all(
            (context.shape, context.dtype) == ((self.rows, weights.width), self.dtype) and index < layers
            for index, context in contexts.items()
        )
        room = self.rows <= cache.rows and weights.cached_layers <= len(cache.keys)
        if not room or scale.dtype != self.dtype or not fits:
            raise ValueError("Cache, contexts and scale do not fit the weights or each other.")
        name = _NAMES[weights.dtype, weights.storage, cache.keys.dtype]
        self._step, self._decode = getattr(loaded, f"step_{name}"), getattr(loaded, f"decode_{name}")
        self.cache, self.columns, self.dim = cache, weights.columns, weights.token_dim
        contexts = {index: context.contiguous() for index, context in contexts.items()}
        self.layers = (_Layer * layers)()
        for index, layer in enumerate(weights.layers):
            place = min(index, weights.cached_layers - 1)
            own = (contexts.get(index), cache.keys[place], cache.values[place])
            self.layers[index] = _Layer(*map(_address, (*layer, *own)))
        # The structure holds bare addresses: the tensors must live as long as it does.
        self.kept = (weights, cache, contexts, scale.contiguous())
        weighty = (weights.input, weights.output, weights.output_bias, weights.place)
        self.model = _model(_number(weights.dtype))(
            *(weights.width, weights.heads, weights.hidden, layers, weights.token_dim, weights.tokens),
            *(weights.gated, weights.causal, weights.final_norm, torch.get_num_threads()),
            *(weights.eps, weights.qk_eps),
            *map(_address, (*weighty, *weights.rotary, self.kept[3])),
            ctypes.addressof(self.layers),
        )
        self.views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.checked: Tensor | None = None
        self.pointers = (ctypes.addressof(self.model), _address(cache.tokens), _address(cache.out))

    def __call__(
        self, x: Float[Tensor, "b n d"], start: int, which: Int[Tensor, " r"]
    ) -> Float[Tensor, "r n o"]:
        """The output's columns for the given tokens of the rows ``which``, and zeros that fill up a vector.

        The result is a view of a buffer that the next call overwrites.

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
            raise ValueError(f"The compiled step refuses {problem}.")
        if (rows, n) not in self.views:
            made = self.cache.out[: rows * n].view(rows, n, self.columns)
            self.views[rows, n] = self.cache.tokens[: rows * n].view(-1, *x.shape), made
        tokens, made = self.views[rows, n]
        tokens.copy_(x)
        model, tokens_address, out = self.pointers
        self._step(model, tokens_address, which.data_ptr(), rows, n, start, out, self.columns)
        return made

    def decode(
        self,
        z: Float[Tensor, "b n d"],
        which: Int[Tensor, " r"],
        log_scale_bound: float | None,
        guidance: Float[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """x of z = f(x) of a block, token after token, in the block's own order.

        Args:
            z: the noise.
            which: rows of the cache: one for each image, or both streams of these images.
            log_scale_bound: of the block.
            guidance: weight w of each token, c + w · (c − u), of the two streams; None: there is one.

        Raises:
            ValueError: as of a step.
        """
        problem = self._problem(z[:, :1], 0, which)
        rows, images = len(which), len(z)
        if problem is None and (z.shape[1] != self.limit or rows != images * (1 if guidance is None else 2)):
            problem = f"{z.shape[1]} tokens of {images} images for {rows} rows of {self.limit}"
        if problem:
            raise ValueError(f"The compiled step refuses {problem}.")
        x, z = torch.empty_like(z, memory_format=torch.contiguous_format), z.contiguous()
        x[:, 0] = z[:, 0]
        weights = None if guidance is None else guidance.to(self.dtype).contiguous()
        model, tokens, out = self.pointers
        for first in range(0, self.limit - 1, _TOGETHER):
            count = min(_TOGETHER, self.limit - 1 - first)
            self._decode(
                *(model, which.data_ptr(), rows, first, count, z.data_ptr(), x.data_ptr(), _address(weights)),
                *(log_scale_bound or 0.0, tokens, out, self.columns),
            )
        return x

    def _problem(self, x: Tensor, start: int, which: Tensor) -> str | None:
        """What is wrong with a call. The compiled code itself would read and write outside of its buffers."""
        rows, n = len(which), x.shape[1]
        if start < 0 or start + n > self.limit:
            return f"tokens {start} ... {start + n - 1}: there are {self.limit}"
        if not self.causal and n < self.limit:
            return f"{n} tokens, which see all {self.limit}"
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
