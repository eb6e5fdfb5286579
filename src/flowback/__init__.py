"""Normalizing flows that generate images and understand them."""

from flowback.checkpoint import load
from flowback.classification import classify
from flowback.config import AlignmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from flowback.errors import InputError
from flowback.flow import Flow, FlowOutput
from flowback.sampling import BlockPlan, Guidance, sample

__all__ = [
    "AlignmentConfig",
    "BlockPlan",
    "DataConfig",
    "Flow",
    "FlowOutput",
    "Guidance",
    "InputError",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "__version__",
    "classify",
    "load",
    "sample",
]

__version__ = "0.1.0"
