"""Draw a student's images: one evaluation of ``inverse``, any number of ``matching``.

The noise of a seed is the teacher's, so that images of both can be laid side by side.

matching integrates dx/dt = v(x, t) from t = 1 (noise) to 0 (images) over squared times,

    t_k = (1 − k/n)²,    Euler: x ← x + (t_{k+1} − t_k) · v(x, t_k)

Heun takes the mean of the velocities at both ends of a step, but in the last one, so a run of n steps has
2n − 1 evaluations (NFM, arXiv 2603.09014: Euler up to 5 evaluations, Heun beyond).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.errors import InputError
from flowback.flow.block import Labels
from flowback.flow.image_model import UserLabels
from flowback.sampling.guidance import Guidance
from flowback.sampling.sampler import BlockPlan, Overflow, noise, seeds_of
from flowback.students.native_network import NativeStudent
from flowback.students.network import StudentNetwork
from flowback.task_config import SampleConfig

__all__ = ["Solver", "StudentSampler", "integrate", "squared_times"]

Solver = Literal["euler", "heun"]
Velocity = Callable[[Tensor, float], Tensor]

EULER_UP_TO = 5
"""Evaluations from which on Heun is the better solver."""


def squared_times(steps: int) -> list[float]:
    """Times 1 = t₀ > … > t_steps = 0."""
    return [(1 - k / steps) ** 2 for k in range(steps + 1)]


def integrate(
    velocity: Velocity, z: Float[Tensor, "b n d"], evaluations: int, solver: Solver
) -> Iterator[Float[Tensor, "b n d"]]:
    """The points on the way from noise to images, after each step.

    Args:
        velocity: v(x, t).
        z: noise.
        evaluations: of the velocity; an even number of Heun's takes an Euler step first.
        solver: of the steps.
    """
    steps = evaluations if solver == "euler" else evaluations // 2 + 1
    euler_first = solver == "heun" and evaluations % 2 == 0
    times, x = squared_times(steps), z
    for k, (now, after) in enumerate(itertools.pairwise(times)):
        v = velocity(x, now)
        if solver == "heun" and after > 0 and not (k == 0 and euler_first):
            v = (v + velocity(x + (after - now) * v, after)) / 2
        x = x + (after - now) * v
        yield x


class StudentSampler:
    """Draws images from one student; stands where a :class:`flowback.Sampler` does.

    It takes the weights as they are: make a new one when they change, and use it in one thread.

    Args:
        student: the network.
        guidance: w, or a :class:`flowback.Guidance` with nothing but a scale. An ``inverse`` student takes it
            as its input, up to the scale that it learned; a ``matching`` one is evaluated with and without
            label, v_c + w · (v_c − v_u).
        evaluations: of the network for an image, those of guidance not counted; None: 1, or 4 of
            ``matching``.
        solver: of ``matching``; None: Euler up to 5 evaluations, Heun beyond.
        batch_size: most images drawn at once.
        bf16: compute in bfloat16, where PyTorch does.
        native: use the compiled step where it is available and suits the network.

    Raises:
        InputError: evaluations out of range, or guidance that the student has not learned.
    """

    plans: tuple[BlockPlan, ...] = ()
    """Of a flow's blocks: a student has none."""

    def __init__(
        self,
        student: StudentNetwork,
        guidance: Guidance | float | Sequence[float] | Tensor = 0.0,
        *,
        evaluations: int | None = None,
        solver: Solver | None = None,
        batch_size: int = 64,
        bf16: bool = False,
        native: bool = True,
    ) -> None:
        self.student, self.bf16, self.images_at_once = student, bf16, batch_size
        self.guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        matching = student.student.method == "matching"
        self.evaluations = (4 if matching else 1) if evaluations is None else evaluations
        self.solver: Solver = solver or ("euler" if self.evaluations <= EULER_UP_TO else "heun")
        if self.evaluations < 1:
            raise InputError(f"--evaluations {self.evaluations} must be at least 1.")
        if not matching and self.evaluations != 1:
            raise InputError(
                f"A student of method inverse draws in one evaluation, not {self.evaluations}; leave "
                "--evaluations out, or distil with --method matching."
            )
        if batch_size < 1:
            raise InputError(f"The batch size is {batch_size}; it must be at least 1.")
        self._check_guidance(matching)
        storage = torch.bfloat16 if bf16 and student.dtype == torch.float32 else student.dtype
        suits = native and NativeStudent.suits(student, storage)
        self._native = NativeStudent(student, storage) if suits else None

    def _check_guidance(self, matching: bool) -> None:
        given = self.guidance
        if given.ramp or given.formula != "tarflow" or given.temperature != 1 or given.blocks is not None:
            raise InputError(
                "A student is guided by --guidance alone: leave out --ramp, --formula, "
                "--attention-temperature and --guided-blocks."
            )
        scales = torch.as_tensor(given.scale)
        most = self.student.student.guidance
        if not matching and bool((scales < 0).any() | (scales > most).any()):
            raise InputError(
                f"The student has learned guidance from 0 to {most:g}, not {given.scale}; distil with "
                "a larger --student.guidance."
            )

    @classmethod
    def from_config(cls, student: StudentNetwork, config: SampleConfig) -> StudentSampler:
        """The sampler that the options describe."""
        return cls(
            student,
            Guidance.from_config(config),
            evaluations=config.evaluations,
            solver=config.solver,
            batch_size=config.batch_size,
            bf16=config.precision == "bf16",
        )

    def check(self, labelled: bool, latent: bool = False) -> None:
        """Refuse guidance without labels, before work starts; arguments as those of a flow's sampler."""
        del latent
        self.guidance.check(labelled)

    def __call__(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
        redraw: int = 0,
    ) -> Float[Tensor, "b c h w"]:
        """Images on [-1, 1], not clamped; arguments as those of :class:`flowback.Sampler`."""
        return torch.cat([states[-1] for states in self._parts(labels, seeds, redraw, every=False)])

    def trajectory(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
        redraw: int = 0,
    ) -> list[Float[Tensor, "b c h w"]]:
        """The way from noise to images: z, then what each step, or each stage, has made of it."""
        return [
            torch.cat(stage) for stage in zip(*self._parts(labels, seeds, redraw, every=True), strict=True)
        ]

    def overflows(
        self,
        labels: UserLabels = None,
        seeds: Sequence[int] | Int[Tensor, " b"] | None = None,
        redraw: int = 0,
    ) -> list[Overflow | None]:
        """Which images are not finite; a student has no blocks to name."""
        images = self(labels, seeds, redraw)
        return [None if bool(image.isfinite().all()) else Overflow(None, None) for image in images]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _parts(
        self, labels: UserLabels, seeds: Sequence[int] | Tensor | None, redraw: int, every: bool
    ) -> list[list[Tensor]]:
        """The trajectories of batches, or their ends."""
        seeds = seeds_of(labels, seeds)
        student = self.student
        checked = student.labels(labels, len(seeds))
        self.guidance.check(checked is not None)
        scales = self.guidance.scales(len(seeds), student.proj_in.weight)
        parts = []
        for start in range(0, len(seeds), self.images_at_once):
            part = slice(start, start + self.images_at_once)
            z = noise(student, seeds[part], redraw)
            given = None if checked is None else checked[part]
            states = (
                [z, *self.states(z, given, scales[part])] if every else [self.draw(z, given, scales[part])]
            )
            parts.append([student.images(x) for x in states])
        return parts

    @torch.no_grad()
    def draw(
        self, z: Float[Tensor, "b n d"], labels: Labels, scales: Float[Tensor, " b"]
    ) -> Float[Tensor, "b n d"]:
        """The clean images' tokens, for one batch of noise and checked labels."""
        if self.student.student.method == "matching":
            return self.states(z, labels, scales)[-1]
        return self._evaluate(z, labels, self._learned(scales))

    def _learned(self, scales: Float[Tensor, " b"]) -> Float[Tensor, " b"] | None:
        """Guidance as the input of an ``inverse`` student."""
        most = self.student.student.guidance
        return scales / most if most else None

    def _evaluate(
        self, z: Float[Tensor, "b n d"], labels: Labels, number: Float[Tensor, " b"] | None
    ) -> Float[Tensor, "b n d"]:
        """The network's output."""
        if self._native is not None:
            return self._native(z, labels, number)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            output: Tensor = self.student(z, labels, None, number)[0]
        return output

    @torch.no_grad()
    def states(
        self, z: Float[Tensor, "b n d"], labels: Labels, scales: Float[Tensor, " b"]
    ) -> list[Float[Tensor, "b n d"]]:
        """What becomes of the noise, the clean images' tokens last.

        ``inverse``: the teacher's states x^(T-1) ... x^0 as the heads read them, then the image.
        ``matching``: the points after each step.
        """
        student = self.student
        if student.student.method == "matching":
            return list(integrate(self._velocity(labels, scales), z, self.evaluations, self.solver))
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            image, hidden = student(z, labels, None, self._learned(scales))
        rms = student.student.rms[-2::-1]  # of x^(T-1) ... x^0
        return [*(x * r for x, r in zip(student.states(hidden), rms, strict=True)), image]

    def _velocity(self, labels: Labels, scales: Float[Tensor, " b"]) -> Velocity:
        def velocity(x: Tensor, t: float) -> Tensor:
            times = x.new_full((len(x),), t)
            with_label = self._evaluate(x, labels, times)
            if not self.guidance.active:
                return with_label
            without = self._evaluate(x, None, times)
            return torch.lerp(without, with_label, 1 + scales[:, None, None])

        return velocity
