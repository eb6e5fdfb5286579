"""Sampling: noise to images, as pure functions of the flow, the labels and the seeds."""

from flowback.sampling.batch import BlockPlan
from flowback.sampling.guidance import Guidance
from flowback.sampling.sample import sample, trajectory

__all__ = ["BlockPlan", "Guidance", "sample", "trajectory"]
