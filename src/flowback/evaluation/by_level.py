"""Classification at several noise levels, by a flow that was trained on a range of them.

The level that classifies best is chosen on training images: chosen on those that are measured, it would
flatter the figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from flowback.checked import require
from flowback.classification import Method, classify
from flowback.data.image_set import ImageSet
from flowback.evaluation.held_out import Accuracy, LoopOptions, held_out_batches, with_labels
from flowback.model import Flow

__all__ = ["LevelAccuracy", "LevelChoice", "accuracy_by_level"]


@dataclass(frozen=True)
class LevelAccuracy:
    """How one rule classifies a set of images at each of several noise levels."""

    levels: tuple[float, ...]
    """Standard deviations of the noise, on the [-1, 1] scale."""
    at: tuple[Accuracy, ...]
    """At each level."""
    averaged: Accuracy
    """By the scores' mean over the levels."""

    def merge(self, other: LevelAccuracy) -> LevelAccuracy:
        """Both sets together, classified at the same time."""
        at = tuple(a.merge(b) for a, b in zip(self.at, other.at, strict=True))
        return LevelAccuracy(self.levels, at, self.averaged.merge(other.averaged))

    @property
    def best(self) -> int:
        """Place of the level with the highest accuracy; of equal ones, the first."""
        return max(range(len(self.levels)), key=lambda place: self.at[place].right1)


@dataclass(frozen=True)
class LevelChoice:
    """The accuracy of one rule at the level that suits training images best."""

    training: LevelAccuracy
    """Of training images, which choose the level."""
    measured: LevelAccuracy
    """Of the images that are measured."""

    @property
    def level(self) -> float:
        """The chosen level."""
        return self.training.levels[self.training.best]

    @property
    def accuracy(self) -> Accuracy:
        """Of the images that are measured, at the chosen level."""
        return self.measured.at[self.training.best]

    def to_dict(self) -> dict[str, Any]:
        """The level, and top-1 shares at all levels and by the scores' mean, ready for JSON."""
        pairs = zip(self.training.at, self.measured.at, strict=True)
        rows = [
            {"noise": level, "training_top1": training.top1, "top1": measured.top1}
            for level, (training, measured) in zip(self.training.levels, pairs, strict=True)
        ]
        return {
            "noise": self.level,
            "chosen_on": self.training.averaged.images,
            "by_noise": rows,
            "averaged": {
                "training_top1": self.training.averaged.top1,
                "top1": self.measured.averaged.top1,
            },
        }


def accuracy_by_level(
    flow: Flow,
    images: ImageSet,
    levels: Sequence[float],
    method: Method = "gradient",
    *,
    draws: int = 1,
    steps: int = 1,
    step_size: float = 1.0,
    **loop: Unpack[LoopOptions],
) -> LevelAccuracy:
    """Classify a data set with :func:`flowback.classify` at each noise level, and by the mean of the scores.

    An image's noise comes from the same seed at all levels, so that they differ by the level alone.

    Args:
        flow: a class-conditional flow that knows the levels.
        images: labelled images; their classes are matched with the model's by name.
        levels: standard deviations of the noise.
        method: the rule.
        draws: draws of the noise to average over, at each level.
        steps: of gradient ascent.
        step_size: of each step.
        **loop: which images, in which batches, with which noise: see :class:`LoopOptions`.

    Raises:
        InputError: no levels, or one that the flow does not know; images without labels, or of other classes
            than the model's.

    Example:
        >>> import flowback
        >>> from flowback.data.load import load_images
        >>> flow = flowback.create_flow("digits-range", num_classes=10, width=16, head_dim=8, layers=1)
        >>> test = load_images(flowback.DataConfig("digits"), image_size=8, channels=1, split="test")
        >>> found = accuracy_by_level(flow, test, [0.1, 0.3], limit=20)
        >>> [each.images for each in found.at], found.levels[found.best] in (0.1, 0.3)
        ([20, 20], True)
    """
    require(len(levels) > 0, "There are no noise levels to classify at; give at least one.")
    images, start = with_labels(flow, images), time.perf_counter()
    nothing = Accuracy.none(method, flow.config.num_classes or 0)
    total = LevelAccuracy(tuple(levels), (nothing,) * len(levels), nothing)
    for batch in held_out_batches(flow, images, f"classify ({method})", **loop):
        scores = [
            classify(flow, batch.images, method, level, draws, batch.seeds, steps, step_size)
            for level in levels
        ]
        assert batch.labels is not None
        at = tuple(Accuracy.of(method, each, batch.labels) for each in scores)
        mean = sum(scores[1:], scores[0]) / len(scores)
        total = total.merge(LevelAccuracy(total.levels, at, Accuracy.of(method, mean, batch.labels)))
    seconds = time.perf_counter() - start
    at = tuple(replace(each, seconds=seconds / len(levels)) for each in total.at)
    return LevelAccuracy(total.levels, at, replace(total.averaged, seconds=seconds))
