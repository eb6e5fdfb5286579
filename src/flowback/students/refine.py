"""The teacher's exact images, by sweeps that start from what its student drew.

A block's inverse by windowed sweeps is exact whatever it starts from (:mod:`flowback.sampling.jacobi`); a
good start only saves sweeps. A student of method ``inverse`` knows the output of each block from its heads,
in one evaluation. One of ``matching`` knows the image alone: the teacher encodes it to the states of its
blocks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.sampling import BlockPlan, Guidance, Sampler
from flowback.students.losses import encode_states
from flowback.students.network import StudentNetwork
from flowback.students.sampler import StudentSampler
from flowback.task_config import SampleConfig

__all__ = ["StudentGuess", "refined_sampler"]


class StudentGuess:
    """A student's estimate of the outputs of its teacher's blocks: where a sampler's sweeps start.

    Args:
        teacher: the flow.
        drawing: the student.
    """

    def __init__(self, teacher: TARFlow, drawing: StudentSampler) -> None:
        self.teacher, self.drawing = teacher, drawing

    @torch.no_grad()
    def __call__(
        self, z: Float[Tensor, "b n d"], labels: Labels, scales: Float[Tensor, " b"]
    ) -> list[Float[Tensor, "b n d"]]:
        """x^(T-1) ... x^0, tokens in raster order."""
        states = self.drawing.states(z, labels, scales)
        if self.drawing.student.student.method == "inverse":
            return states[:-1]
        encoded = encode_states(self.teacher, self.teacher.images(states[-1]), labels)
        return encoded[-2::-1]


def refined_sampler(teacher: TARFlow, student: StudentNetwork, config: SampleConfig) -> Sampler:
    """The teacher's sampler by windows in all blocks, which start from the student's estimates.

    Args:
        teacher: the flow whose images are drawn.
        student: its student.
        config: how; its windows and tolerance are those of ``--sampler jacobi``.

    Raises:
        InputError: options that do not fit the models.
    """
    window = min(config.window, teacher.config.tokens)
    return Sampler(
        teacher,
        Guidance.from_config(config),
        config.denoise,
        batch_size=config.batch_size,
        precision=config.precision,
        plans=(BlockPlan(window, "z", config.tolerance),) * teacher.config.blocks,
        guess=StudentGuess(teacher, StudentSampler.from_config(student, config)),
    )
