"""A student judged by its teacher, which is exact in both directions.

From the same noise, student and teacher draw the same image if the student is the exact inverse; so much for
its error. The teacher then tells how likely the student's images are, and how well it knows their classes,
beside its own images and test images. All three get the training noise first, from the same seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from flowback.classification import classify
from flowback.data.pixels import to_unit_range
from flowback.evaluation.held_out import Estimate, HeldOutBatch
from flowback.evaluation.judge import Judge
from flowback.evaluation.metrics import Moments, frechet_distance, jackknife
from flowback.flow.likelihood import nll_per_dim
from flowback.flow.tarflow import UserLabels
from flowback.model import Flow

__all__ = ["GROUPS", "DrawnPairs", "UnderTeacher", "draw_pairs", "under_teacher"]

GROUPS = 10
"""Groups of samples that are left out in turn, for the distance's standard error."""

Drawing = Callable[[UserLabels, Sequence[int]], Tensor]


@dataclass(frozen=True)
class UnderTeacher:
    """Images as the teacher sees them."""

    nll: Float[Tensor, " n"]
    """Nats per dimension of each image, with noise on it, given its label."""
    right: Bool[Tensor, " n"] | None
    """Whether the gradient rule finds its label; None without classes."""

    @classmethod
    def joined(cls, parts: Sequence[UnderTeacher]) -> UnderTeacher:
        """All images of the parts."""
        right = [part.right for part in parts if part.right is not None]
        return cls(torch.cat([part.nll for part in parts]), torch.cat(right) if right else None)

    def merge(self, other: UnderTeacher) -> UnderTeacher:
        """Both sets."""
        return self.joined([self, other])

    def figures(self, whose: str) -> dict[str, float]:
        """Means and their standard errors, under names that end with ``whose``."""
        nll = Estimate.of(self.nll[None])
        figures = {f"nll_{whose}": nll.mean, f"nll_{whose}_error": nll.error}
        if self.right is not None:
            top1 = Estimate.of(self.right.double()[None])
            figures |= {f"top1_gradient_{whose}": top1.mean, f"top1_gradient_{whose}_error": top1.error}
        return figures


def under_teacher(teacher: Flow, batches: Iterable[HeldOutBatch]) -> UnderTeacher:
    """What the teacher says of clean images.

    Args:
        teacher: the flow.
        batches: images, labels, and the seeds of the noise that they get.
    """
    parts = []
    for batch in batches:
        with torch.no_grad():
            noised = batch.noised(teacher.config)
            log_prob = teacher.log_prob(noised, batch.labels, noise=batch.levels)
        nll, right = nll_per_dim(log_prob.cpu().double(), teacher.config.dims), None
        if batch.labels is not None:
            scores = classify(teacher, batch.images, "gradient", batch.level, seeds=batch.seeds)
            right = (scores.argmax(dim=1) == batch.labels).cpu()
        parts.append(UnderTeacher(nll, right))
    return UnderTeacher.joined(parts)


@dataclass(frozen=True)
class DrawnPairs:
    """Images of student and teacher from the same noise, or one process's part of them."""

    errors: Float[Tensor, " n"]
    """Root mean square difference of each pair, on the [-1, 1] scale."""
    unrelated: Float[Tensor, " m"]
    """The same of two images of the teacher from other noise, of one class where there are classes."""
    student: UnderTeacher
    teacher: UnderTeacher
    student_features: list[Moments]
    """In the encoder's pooled features, by group."""
    teacher_features: list[Moments]

    def merge(self, other: DrawnPairs) -> DrawnPairs:
        """Both parts."""

        def joined(a: list[Moments], b: list[Moments]) -> list[Moments]:
            return [one.merge(two) for one, two in zip(a, b, strict=True)]

        return DrawnPairs(
            torch.cat([self.errors, other.errors]),
            torch.cat([self.unrelated, other.unrelated]),
            self.student.merge(other.student),
            self.teacher.merge(other.teacher),
            joined(self.student_features, other.student_features),
            joined(self.teacher_features, other.teacher_features),
        )

    def figures(self, reference: Moments | None) -> dict[str, Any]:
        """Error to the exact inverse, likelihoods, accuracies, and distances to the reference."""
        estimate = Estimate.of(self.errors[None])
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        quantiles = self.errors.double().quantile(levels).tolist()
        figures: dict[str, Any] = {"inverse_error": estimate.mean, "inverse_error_error": estimate.error}
        figures |= {f"inverse_error_q{q:02d}": v for q, v in zip((5, 50, 95), quantiles, strict=True)}
        if len(self.unrelated):
            figures["inverse_error_of_other_noise"] = float(self.unrelated.double().mean())
        figures |= self.student.figures("student") | self.teacher.figures("teacher")
        if reference is None:
            return figures
        for whose, groups in (("", self.student_features), ("_teacher", self.teacher_features)):
            name, filled = f"fd_efficientnet_lite0{whose}", [group for group in groups if group.count]
            figures[name] = frechet_distance(_total(filled), reference)
            if len(filled) > 1:
                figures[f"{name}_error"] = jackknife(filled, reference)
        figures["fd_ratio"] = figures["fd_efficientnet_lite0"] / figures["fd_efficientnet_lite0_teacher"]
        return figures


def _total(groups: Sequence[Moments]) -> Moments:
    total = groups[0]
    for group in groups[1:]:
        total = total.merge(group)
    return total


def draw_pairs(
    teacher: Flow,
    student: Drawing,
    exact: Drawing,
    judge: Judge,
    to_pixels: Callable[[Tensor], UInt8[Tensor, "b c h w"]],
    parts: Iterable[Int64[Tensor, " b"]],
    first_seed: int = 0,
    level: float | None = None,
) -> DrawnPairs:
    """Draw and measure, batch by batch: sample i has seed ``first_seed`` + i and class i modulo their number.

    Args:
        teacher: judges both.
        student: draws the student's images.
        exact: draws the teacher's.
        judge: gives the encoder of the features.
        to_pixels: images as 8-bit values.
        parts: numbers of the samples.
        first_seed: of sample 0.
        level: of the noise that the teacher is asked at, if it has a range of levels.
    """
    classes = teacher.config.num_classes or 0
    features = [[Moments(judge.encoder.dim) for _ in range(GROUPS)] for _ in range(2)]
    seen: tuple[list[UnderTeacher], list[UnderTeacher]] = ([], [])
    errors, unrelated = [], []
    for index in parts:
        seeds = (first_seed + index).tolist()
        labels = index % classes if classes else None
        pair = [draw(labels, seeds) for draw in (student, exact)]
        errors.append(_difference(*pair))
        step = max(classes, 1)
        unrelated.append(_difference(pair[1][step:], pair[1][:-step]))
        for images, groups, found in zip(pair, features, seen, strict=True):
            pixels = to_pixels(images)
            pooled = judge.encoder.pooled(to_unit_range(pixels.to(judge.encoder.mean.device))).cpu()
            for group, moments in enumerate(groups):
                moments.add(pooled[index % GROUPS == group])
            given = None if labels is None else labels.to(teacher.device)
            levels = teacher.levels(level, len(index))
            batch = HeldOutBatch(images.to(teacher.data_dtype), given, seeds, levels)
            found.append(under_teacher(teacher, [batch]))
    of_student, of_teacher = map(UnderTeacher.joined, seen)
    return DrawnPairs(torch.cat(errors), torch.cat(unrelated), of_student, of_teacher, *features)


def _difference(one: Float[Tensor, "b c h w"], two: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    return (one - two).flatten(1).square().mean(dim=1).sqrt().cpu()
