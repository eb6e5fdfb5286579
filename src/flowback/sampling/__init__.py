"""Sampling: noise to images, as pure functions of the flow, the labels and the seeds."""

from flowback.sampling.block_plan import plan_sampling
from flowback.sampling.denoise import Denoising
from flowback.sampling.editing import Inpainted, inpaint, interpolate
from flowback.sampling.guidance import Guidance
from flowback.sampling.sampler import BlockPlan, Sampler, sample

__all__ = [
    "BlockPlan",
    "Denoising",
    "Guidance",
    "Inpainted",
    "Sampler",
    "inpaint",
    "interpolate",
    "plan_sampling",
    "sample",
]
