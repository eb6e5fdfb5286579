"""Sampling: noise to images, as pure functions of the flow, the labels and the seeds."""

from flowback.sampling.guidance import Guidance
from flowback.sampling.sample import sample, trajectory

__all__ = ["Guidance", "sample", "trajectory"]
