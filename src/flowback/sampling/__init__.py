"""Sampling: noise to images, as pure functions of the flow, the labels and the seeds."""

from flowback.sampling.guidance import Guidance
from flowback.sampling.sampler import BlockPlan, sample, trajectory

__all__ = ["BlockPlan", "Guidance", "sample", "trajectory"]
