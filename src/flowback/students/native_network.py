"""A student's evaluations by the compiled step: all stages in one call, for small networks on the CPU.

PyTorch would spend most of the time of a narrow network between its operations.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.flow.block import Labels
from flowback.sampling.native import NativeCache, NativeStep, NativeWeights, Parts
from flowback.students.network import StudentNetwork

__all__ = ["NativeStudent"]

_WIDEST = 256
"""Width above which the products of PyTorch are faster than the step's, which are made for few rows."""


class NativeStudent:
    """The network with the weights that it has now; make a new one when they change. For one thread.

    Args:
        student: the network; :meth:`suits` must hold.
        storage: dtype of its matrices, keys and values.
    """

    def __init__(self, student: StudentNetwork, storage: torch.dtype) -> None:
        self.student, self.weights = student, NativeWeights(_parts(student), storage)
        layers = student.student.layers
        self._first = [stage * layers for stage in range(len(student.stages))]
        """Layers before which a stage begins."""
        self._steps: dict[int, tuple[NativeStep, list[Tensor], Tensor]] = {}
        self._cache: NativeCache | None = None

    @staticmethod
    def suits(student: StudentNetwork, storage: torch.dtype) -> bool:
        """Whether the compiled step can run this network, and is the faster way."""
        parts = _parts(student)
        return parts.proj_in.out_features <= _WIDEST and NativeWeights.suits(parts, storage)

    @torch.no_grad()
    def __call__(
        self, z: Float[Tensor, "b n d"], labels: Labels = None, number: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The output's tokens; arguments as those of the network."""
        step, contexts, rows = self._step(len(z))
        for kept, context in zip(contexts, self.student.contexts(z, labels, None, number), strict=True):
            kept.copy_(context)  # that of no labels is one for all
        return step(z, 0, rows)[..., : z.shape[2]].clone()

    def _step(self, rows: int) -> tuple[NativeStep, list[Tensor], Tensor]:
        """The step for so many images, what it reads their contexts from, and their numbers."""
        if rows not in self._steps:
            weights = self.weights
            if self._cache is None or rows > self._cache.rows:
                self._steps, self._cache = {}, NativeCache.empty(weights, rows, weights.tokens)
            contexts = [weights.place.new_empty(rows, weights.width) for _ in self._first]
            scale = weights.place.new_full((rows,), weights.head_dim**-0.5)
            step = NativeStep(weights, self._cache, dict(zip(self._first, contexts, strict=True)), scale)
            self._steps[rows] = step, contexts, torch.arange(rows)
        return self._steps[rows]


def _parts(student: StudentNetwork) -> Parts:
    ends = student.proj_in, student.bodies, student.proj_out
    return Parts(*ends, student.position, student.rotary, student.norm, causal=False)
