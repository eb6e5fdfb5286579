"""A decode step of one token as a CUDA graph: one launch in place of some fifteen kernels a layer.

A graph repeats the same kernels on the same memory. So the token, its place, the label's context and the
temperature lie in buffers that are filled before each launch, and attention reads all keys up to the end of
the quarter of the sequence that the token lies in, those after the token masked. There is one graph for each
quarter; it is recorded when its first token comes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.flow.block import Block
from flowback.nn.attention import KVCache

__all__ = ["CapturedStep", "captures", "cuda_graph"]

logger = logging.getLogger(__name__)


PARTS = 4
"""Graphs a block; more read fewer masked keys, and take longer to record."""


Run = Callable[[], tuple[Tensor, Tensor]]


def captures(device: torch.device) -> bool:
    """Whether steps are captured on this device; ``FLOWBACK_CUDA_GRAPHS=0`` turns it off."""
    return device.type == "cuda" and os.environ.get("FLOWBACK_CUDA_GRAPHS", "1") != "0"


def cuda_graph(run: Run) -> Run:
    """``run`` recorded once: a call repeats it, into the same tensors. Where that fails, ``run`` itself."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # libraries set themselves up at their first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, those that pin memory for example, may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = run()
    except RuntimeError as error:
        logger.warning("Decoding without CUDA graphs: %s", str(error).splitlines()[0])
        return run

    def repeat() -> tuple[Tensor, Tensor]:
        graph.replay()
        return results

    return repeat


class CapturedStep:
    """Shift and log-scale of one block for one token at a time, in the order of the tokens.

    Args:
        block: the block.
        cache: keys and values; blocks that are inverted one after another may share it.
        context: of each row, or None for a model without classes.
        temperature: of each row's attention logits.
        autocast: dtype of the Transformer, None for that of the weights.
    """

    def __init__(
        self,
        block: Block,
        cache: KVCache,
        context: Float[Tensor, "r w"] | None,
        temperature: Float[Tensor, " r"],
        autocast: torch.dtype | None = None,
    ) -> None:
        self.block, self.cache, self.autocast = block, cache, autocast
        weight = block.proj_in.weight
        self._token = weight.new_zeros(len(temperature), 1, weight.shape[1])
        self._place = torch.zeros(1, dtype=torch.long, device=weight.device)
        self._context = None if context is None else context.clone()
        self._temperature = temperature.clone().view(-1, 1, 1, 1)
        tokens = cache.keys.shape[3]
        self._ends = sorted({-(-tokens * part // PARTS) for part in range(1, PARTS + 1)})
        self._graphs: dict[int, Run] = {}

    def restart(self, context: Tensor | None, temperature: Tensor) -> CapturedStep:
        """The same graphs for another batch of as many rows."""
        if self._context is not None and context is not None:
            self._context.copy_(context)
        self._temperature.copy_(temperature.view(-1, 1, 1, 1))
        return self

    def __call__(
        self, x: Float[Tensor, "b 1 d"], start: int, which: Int[Tensor, " r"]
    ) -> tuple[Float[Tensor, "r 1 d"], Float[Tensor, "r 1 d"]]:
        """As any :class:`~flowback.sampling.decoder.Step`; all images, one token."""
        del which
        if start == 0:
            # Masked keys and values count nothing, but only if they are numbers.
            self.cache.keys.zero_()
            self.cache.values.zero_()
        self._token.view(-1, *x.shape).copy_(x)  # once, or for both streams
        self._place.fill_(start)
        end = next(end for end in self._ends if start < end)
        with torch.cuda.device_of(self._token):  # streams and graphs belong to the current device
            if end not in self._graphs:
                self._graphs[end] = cuda_graph(lambda: self._run(end))
            return self._graphs[end]()

    def _run(self, end: int) -> tuple[Tensor, Tensor]:
        cache = KVCache(self.cache.keys[:, :, :, :end], self.cache.values[:, :, :, :end])
        with torch.autocast(self._token.device.type, self.autocast, enabled=self.autocast is not None):
            return self.block.step(self._token, self._context, cache, self._place, self._temperature)
