"""Predictions of a block for tokens that follow what it has already seen, on the fastest way there is.

A :class:`Decoder` hides how a step is computed (compiled code or PyTorch) and whether it is guided, in which
case the streams with and without label run as one batch of 2B rows. Everything is in the block's own order.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.flow import TARFlow, affine
from flowback.flow.block import Block
from flowback.nn.attention import KVCache
from flowback.sampling.cuda_graph import CapturedStep, captures
from flowback.sampling.guidance import ImageGuide
from flowback.sampling.native import NativeCache, NativeStep, NativeWeights

__all__ = ["Decoder", "Engine", "Precision", "sequential"]

Precision = Literal["fp32", "bf16"]
"""``bf16``: weights, keys and values in bfloat16 (matrix products too, where PyTorch runs them); shift,
log-scale and what follows stay in fp32."""


class Decoder:
    """One block, set up for one batch of images; steps must come in the order of the tokens.

    Args:
        block: the block.
        images: number of images.
        step: computes shift and log-scale of rows.
        guide: joins the predictions of 2B rows; without one there are B.
    """

    def __init__(
        self,
        block: Block,
        images: int,
        step: NativeStep | CapturedStep | _TorchStep,
        guide: ImageGuide | None,
    ) -> None:
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


class _TorchStep:
    """The predictions of one block, computed by PyTorch."""

    def __init__(
        self, block: Block, cache: KVCache, context: Tensor | None, temperature: Tensor, precision: Precision
    ) -> None:
        self.block, self.cache, self.context = block, cache, context
        self.temperature, self.precision = temperature, precision
        self.plain = bool((temperature == 1).all())

    def __call__(self, x: Tensor, start: int, which: Tensor) -> tuple[Tensor, Tensor]:
        cache, context, temperature = self.cache, self.context, self.temperature
        if len(which) > len(x):  # the streams of the same images
            x = torch.cat([x, x])
        if len(which) < cache.keys.shape[1]:  # some images have left the batch
            cache = KVCache(cache.keys[:, which], cache.values[:, which])
            context = None if context is None else context[which]
            temperature = temperature[which]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            shift, log_scale, _ = self.block._run(
                x, context, cache, start, 1.0 if self.plain else temperature.view(-1, 1, 1, 1)
            )
        if cache is not self.cache:
            new = slice(start, start + x.shape[1])
            self.cache.keys[:, which, :, new] = cache.keys[:, :, :, new]
            self.cache.values[:, which, :, new] = cache.values[:, :, :, new]
        return shift, log_scale


class Engine:
    """Decoders for the blocks of a flow, with weights prepared and caches allocated once.

    Args:
        flow: the model.
        precision: of weights and caches.
        native: use the compiled step where it can be had and suits the model.
    """

    def __init__(self, flow: TARFlow, precision: Precision = "fp32", native: bool = True) -> None:
        # Flows in float64 are for exactness: nothing of theirs is narrowed.
        self.flow, self.precision = flow, precision if flow.dtype == torch.float32 else "fp32"
        storage = torch.bfloat16 if self.precision == "bf16" else flow.dtype
        self._weights = [
            NativeWeights(block, storage) if native and NativeWeights.suits(block, storage) else None
            for block in flow.blocks
        ]
        self._caches: dict[tuple[int, int], NativeCache] = {}
        self._captured: dict[int, CapturedStep] = {}
        self._rows = 0

    @property
    def native(self) -> bool:
        """Whether the compiled step decodes."""
        return self._weights[0] is not None

    def images_at_once(self, batch_size: int, guided: bool) -> int:
        """Images that are best decoded together, at most ``batch_size``.

        On the CPU some 16 rows already keep the processor busy with each weight that it reads; more rows only
        push keys and values out of the memory near it.
        """
        if not self.native:
            return batch_size
        rows = max(16, 8 * torch.get_num_threads())
        return min(batch_size, rows // 2 if guided else rows)

    def decoder(
        self,
        index: int,
        images: int,
        context: Float[Tensor, "#r w"] | None,
        guide: ImageGuide | None = None,
        temperature: Float[Tensor, " r"] | None = None,
        new: int = 1,
    ) -> Decoder:
        """The decoder of one block; it ends the one before it, whose cache it takes.

        Args:
            index: number of the block, from 1.
            images: images of the batch.
            context: of each row: B images, or 2B streams with a guide.
            guide: joins the two streams.
            temperature: of each row's attention logits.
            new: most tokens in a step.
        """
        block, weights = self.flow.blocks[index - 1], self._weights[index - 1]
        rows = 2 * images if guide else images
        like = block.proj_in.weight
        if temperature is None:
            temperature = like.new_ones(rows)
        if context is not None:
            context = context.expand(rows, -1).to(like.dtype)
        if weights is None:
            if new == 1 and captures(like.device):
                return Decoder(block, images, self._capture(index, rows, context, temperature), guide)
            cache = self._cache(block, rows)
            return Decoder(
                block, images, _TorchStep(block, cache, context, temperature, self.precision), guide
            )
        if (rows, new) not in self._caches:
            self._caches = {(rows, new): NativeCache.empty(weights, rows, new)}  # the old one is let go
        scale = 1 / (block.body.head_dim**0.5 * temperature)
        return Decoder(block, images, NativeStep(weights, self._caches[rows, new], context, scale), guide)

    def _cache(self, block: Block, rows: int) -> KVCache:
        dtype = torch.bfloat16 if self.precision == "bf16" else block.proj_in.weight.dtype
        like = block.proj_in.weight.new_empty(0, dtype=dtype)
        return block.body.empty_cache(rows, self.flow.config.tokens, like)

    def _capture(self, index: int, rows: int, context: Tensor | None, temperature: Tensor) -> CapturedStep:
        """The block's captured step, kept for the next batch of as many rows; all share one cache."""
        block = self.flow.blocks[index - 1]
        if rows != self._rows:
            self._captured, self._rows = {}, rows
        if index in self._captured:
            return self._captured[index].restart(context, temperature)
        others = list(self._captured.values())
        cache = others[0].cache if others else self._cache(block, rows)
        autocast = torch.bfloat16 if self.precision == "bf16" else None
        self._captured[index] = CapturedStep(block, cache, context, temperature, autocast)
        return self._captured[index]


@torch.no_grad()
def sequential(decoder: Decoder, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """x of z = f(x): each token from the prediction of those before it; both in the block's own order."""
    x = torch.empty_like(z)
    x[:, 0] = z[:, 0]
    known, noise = x.split(1, dim=1), z.split(1, dim=1)  # views of each token
    for i in range(z.shape[1] - 1):
        shift, log_scale = decoder.step(known[i], i)
        known[i + 1].copy_(affine.inverse(noise[i + 1], shift, log_scale))
    return x
