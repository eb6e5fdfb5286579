"""Predictions of a block for the tokens that follow those it has seen, in the fastest way available.

A :class:`Decoder` hides how a step is computed (PyTorch, compiled code or a CUDA graph: each is a
:class:`Step`) and whether it is guided, in which case the streams with and without label run as one batch of
2B rows. Everything is in the block's own order.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowback.checked import require_one_of
from flowback.flow import TARFlow, affine
from flowback.flow.block import Block
from flowback.nn.attention import KVCache
from flowback.sampling.cuda_graph import CapturedStep, captures
from flowback.sampling.guidance import ImageGuide
from flowback.sampling.native import NativeCache, NativeStep, NativeWeights, Parts, last_cache

__all__ = ["Decoder", "Engine", "Kept", "Precision", "PredictionStep", "Step", "TorchStep", "sequential"]

Precision = Literal["fp32", "kv-bf16", "bf16"]
"""``bf16``: weights, keys and values in bfloat16 (matrix products too, where PyTorch runs them); shift,
log-scale and what follows stay in fp32. ``kv-bf16``: keys and values alone, all sums in fp32."""


@runtime_checkable
class Step(Protocol):
    """How one block's predictions are computed, for some rows of a batch."""

    def __call__(
        self, x: Float[Tensor, "b n d"], start: int, which: Int[Tensor, " r"]
    ) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        """Shift and log-scale of the tokens that follow those in ``x``; the next call may overwrite them.

        Args:
            x: the tokens of each row, or of each image where the rows are the two streams of these images.
            start: place of the first token.
            which: rows of the cache, in rising order.
        """
        ...


class Decoder:
    """One block, set up for one batch of images; steps must come in the order of the tokens.

    Args:
        block: the block.
        images: number of images.
        step: computes shift and log-scale of rows.
        guide: joins the predictions of 2B rows; without one there are B.
    """

    def __init__(self, block: Block, images: int, step: Step, guide: ImageGuide | None) -> None:
        self.block, self.images, self._step, self._guide = block, images, step, guide
        self._every = self._rows(torch.arange(images))

    def _rows(self, images: Int[Tensor, " b"]) -> Int[Tensor, " r"]:
        return torch.cat([images, images + self.images]) if self._guide else images

    def step(
        self, x: Float[Tensor, "b n d"], start: int, images: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        """Shift and log-scale of the tokens that follow those in ``x``.

        Their keys and values join the cache; a later step with the same or an earlier start replaces them.
        The results may be views of a buffer that the next step overwrites.

        Args:
            x: tokens start ... start + n − 1.
            start: place of the first one.
            images: which images ``x`` holds, in rising order; None is all.
        """
        rows = self._every if images is None else self._rows(images)
        shift, log_scale = self._step(x, start, rows)
        if self._guide is None:
            return shift, log_scale
        return self._guide(shift, log_scale, start + 1, images)

    def decode(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"] | None:
        """x of z = f(x), in the compiled code's own loop; None if it has none for this step or guide."""
        linear = self._guide is None or self._guide.linear
        if not linear or not isinstance(self._step, PredictionStep):
            return None
        return self._step.decode(z, self._every, None if self._guide is None else self._guide.weights)


class TorchStep:
    """The predictions of one block, computed by PyTorch: :meth:`flowback.flow.block.Block.step` on some rows.

    Args:
        block: the block.
        cache: keys and values, of as many rows as there are; overwritten.
        context: of each row, or None for a model without classes.
        temperature: of each row's attention logits; None is 1.
        precision: of the Transformer.
    """

    def __init__(
        self,
        block: Block,
        cache: KVCache,
        context: Float[Tensor, "r w"] | None,
        temperature: Float[Tensor, " r"] | None,
        precision: Precision = "fp32",
    ) -> None:
        self.block, self.cache, self.context = block, cache, context
        self.temperature, self.precision = temperature, precision

    def __call__(
        self, x: Float[Tensor, "b n d"], start: int, which: Int[Tensor, " r"]
    ) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        """As :class:`Step` says."""
        cache, context, temperature = self.cache, self.context, self.temperature
        if len(which) > len(x):  # the streams of the same images
            x = torch.cat([x, x])
        if len(which) < cache.keys.shape[1]:  # some images have left the batch
            cache = KVCache(cache.keys[:, which], cache.values[:, which])
            context = None if context is None else context[which]
            temperature = None if temperature is None else temperature[which]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            shift, log_scale = self.block.step(
                x, context, cache, start, 1.0 if temperature is None else temperature.view(-1, 1, 1, 1)
            )
        if cache is not self.cache:
            new = slice(start, start + x.shape[1])
            self.cache.keys[:, which, :, new] = cache.keys[:, :, :, new]
            self.cache.values[:, which, :, new] = cache.values[:, :, :, new]
        return shift, log_scale


class PredictionStep:
    """The predictions of one block, computed by the compiled step.

    Args:
        step: of the block.
        log_scale_bound: of the block.
    """

    def __init__(self, step: NativeStep, log_scale_bound: float | None) -> None:
        self.step, self.log_scale_bound = step, log_scale_bound
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, x: Float[Tensor, "b n d"], start: int, which: Int[Tensor, " r"]
    ) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        """As :class:`Step` says.

        Raises:
            ValueError: as of :class:`flowback.sampling.native.NativeStep`.
        """
        made = self.step(x, start, which)
        size = (len(which), x.shape[1])
        if size not in self._views:  # made anew for each token they would cost as much as a small step
            dim = x.shape[2]
            self._views[size] = made[..., dim : 2 * dim], made[..., :dim]
        shift, log_scale = self._views[size]
        return shift, affine.bounded(log_scale, self.log_scale_bound)

    def decode(
        self, z: Float[Tensor, "b n d"], which: Int[Tensor, " r"], guidance: Float[Tensor, "b n"] | None
    ) -> Float[Tensor, "b n d"]:
        """All tokens in one go; arguments and errors as of :class:`flowback.sampling.native.NativeStep`."""
        return self.step.decode(z, which, self.log_scale_bound, guidance)


class Engine:
    """What all batches of a flow share: packed weights, caches, and steps recorded as CUDA graphs.

    Caches grow to the largest batch and stay. Use an engine in one thread, with one decoder at a time, and
    make a new one when the flow's weights change.

    Args:
        flow: the model.
        precision: of weights and caches.
        native: use the compiled step if it is available and suits the model.
    """

    def __init__(self, flow: TARFlow, precision: Precision = "fp32", native: bool = True) -> None:
        # Flows in float64 are for exactness: nothing of theirs is narrowed.
        require_one_of(precision, Precision, "precision")
        self.flow, self.precision = flow, precision if flow.dtype == torch.float32 else "fp32"
        storage = torch.bfloat16 if self.precision == "bf16" else flow.dtype
        self._cached = flow.dtype if self.precision == "fp32" else torch.bfloat16
        self._weights = [
            NativeWeights(parts, storage) if native and NativeWeights.suits(parts, storage) else None
            for parts in map(Parts.of_block, flow.blocks)
        ]
        narrow = self.precision == "bf16" and not self.native
        self._blocks = [_narrowed(block) if narrow else block for block in flow.blocks]
        self._native_cache: NativeCache | None = None
        self._cache: KVCache | None = None
        self._captured: dict[int, dict[int, CapturedStep]] = {}
        """Steps by number of rows and by block."""

    @property
    def native(self) -> bool:
        """Whether the compiled step decodes."""
        return self._weights[0] is not None

    def images_at_once(self, batch_size: int, guided: bool) -> int:
        """Images that are best decoded together, at most ``batch_size``.

        On the CPU some 8 rows a thread keep the processor busy with each weight that it reads. Up to 32 gain
        a little more, where all keys and values have room in half of its last cache.
        """
        if not self.native:
            return batch_size
        threads, room = torch.get_num_threads(), last_cache() // 2
        rows, most = max(16, 8 * threads), 32 * threads
        while 2 * rows <= most and 2 * rows * self._row_bytes <= room:
            rows *= 2
        return min(batch_size, rows // 2 if guided else rows)

    @property
    def _row_bytes(self) -> int:
        """Keys and values of one row, in the deepest block."""
        config = self.flow.config
        return 2 * max(config.depths) * config.tokens * config.width * self._cached.itemsize

    def decoder(
        self,
        index: int,
        images: int,
        context: Float[Tensor, "#r w"] | None,
        guide: ImageGuide | None = None,
        temperature: Float[Tensor, " r"] | None = None,
        new: int = 1,
    ) -> Decoder:
        """The decoder of one block; it takes over the cache of the one before, which can no longer be used.

        Args:
            index: number of the block, from 1.
            images: images of the batch.
            context: of each row: B images, or 2B streams with a guide.
            guide: joins the two streams.
            temperature: of each row's attention logits; None is 1.
            new: most tokens in a step.
        """
        block, weights = self.flow.blocks[index - 1], self._weights[index - 1]
        rows = 2 * images if guide else images
        like = block.proj_in.weight
        temperatures = like.new_ones(rows) if temperature is None else temperature
        if context is not None:
            context = context.expand(rows, -1).to(like.dtype)
        step: Step
        if weights is not None:
            scale = 1 / (block.body.head_dim**0.5 * temperatures)
            contexts = {} if context is None else {0: context}
            native = NativeStep(weights, self._room(weights, rows, new), contexts, scale)
            step = PredictionStep(native, block.log_scale_bound)
        elif new == 1 and captures(like.device):
            step = self._capture(index, rows, context, temperatures)
        else:
            cache = self._rows(rows, len(block.body.layers))
            step = TorchStep(self._blocks[index - 1], cache, context, temperature, self.precision)
        return Decoder(block, images, step, guide)

    def _room(self, weights: NativeWeights, rows: int, new: int) -> NativeCache:
        """The compiled steps' cache, with room for so many rows and new tokens."""
        cache = self._native_cache
        if cache is None or rows > cache.rows or new > cache.new:
            most = (rows, new) if cache is None else (max(rows, cache.rows), max(new, cache.new))
            self._native_cache = None  # the old one is let go first
            layers = max(self.flow.config.depths)
            self._native_cache = cache = NativeCache.empty(weights, *most, layers, self._cached)
        return cache

    def _rows(self, rows: int, layers: int) -> KVCache:
        """So many rows and layers of PyTorch's cache, which has room for the deepest block."""
        if self._cache is None or rows > self._cache.keys.shape[1]:
            weight = self.flow.blocks[0].proj_in.weight
            self._cache, self._captured = None, {}  # graphs hold the old one
            deepest = max(self.flow.blocks, key=lambda block: len(block.body.layers))
            self._cache = deepest.body.empty_cache(
                rows, self.flow.config.tokens, weight.new_empty(0, dtype=self._cached)
            )
        return KVCache(self._cache.keys[:layers, :rows], self._cache.values[:layers, :rows])

    def _capture(self, index: int, rows: int, context: Tensor | None, temperature: Tensor) -> CapturedStep:
        """The block's captured step, kept for the next batch of as many rows; all share one cache.

        Graphs of two numbers of rows are kept: those of whole batches, and of the rest of a call.
        """
        block = self._blocks[index - 1]
        cache = self._rows(rows, len(block.body.layers))
        if rows not in self._captured and len(self._captured) == 2:
            self._captured = {}
        kept = self._captured.setdefault(rows, {})
        if index in kept:
            return kept[index].restart(context, temperature)
        autocast = torch.bfloat16 if self.precision == "bf16" else None
        kept[index] = CapturedStep(block, cache, context, temperature, autocast)
        return kept[index]


def _narrowed(block: Block) -> Block:
    """The block with the Transformer's matrices in bf16, which autocast would convert anew at every token."""
    linear = [m for part in (block.proj_in, block.body) for m in part.modules() if isinstance(m, nn.Linear)]
    memo = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}  # shared, but for these
    memo |= {id(p): nn.Parameter(p.detach().bfloat16(), False) for m in linear for p in m.parameters()}
    return copy.deepcopy(block, memo)


class Kept(NamedTuple):
    """Tokens whose values are known before they are decoded, in the block's own order."""

    tokens: Float[Tensor, "b n d"]
    """Their values; those at other places are not read."""
    places: Bool[Tensor, "b n"]
    """True where the value is known."""


@torch.no_grad()
def sequential(
    decoder: Decoder, z: Float[Tensor, "b n d"], kept: Kept | None = None
) -> Float[Tensor, "b n d"]:
    """x of z = f(x): each token from the prediction of those before it; all in the block's own order.

    Kept tokens get their value instead, and what follows them is predicted from it.
    """
    if kept is None and (decoded := decoder.decode(z)) is not None:
        return decoded
    x = torch.empty_like(z)
    x[:, 0] = z[:, 0]
    known, noise = x.split(1, dim=1), z.split(1, dim=1)  # views of each token
    if kept is not None:
        x[kept.places] = kept.tokens[kept.places]
    for i in range(z.shape[1] - 1):
        shift, log_scale = decoder.step(known[i], i)
        decoded = affine.inverse(noise[i + 1], shift, log_scale)
        if kept is not None:
            decoded = torch.where(kept.places[:, i + 1, None, None], known[i + 1], decoded)
        known[i + 1].copy_(decoded)
    return x
