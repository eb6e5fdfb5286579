"""Normalizing flows that generate images and understand them.

Names are loaded when they are first used, so that ``import flowback`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowback.alignment.align import Alignment
    from flowback.alignment.encoders import Encoder, Recipe, create_encoder, register_encoder
    from flowback.classification import classify
    from flowback.config import (
        AlignmentConfig,
        DataConfig,
        ModelConfig,
        RunConfig,
        SampleConfig,
        TrainConfig,
    )
    from flowback.errors import InputError
    from flowback.flow import FlowOutput
    from flowback.model import Flow, create_flow, load
    from flowback.presets import list_presets
    from flowback.sampling import BlockPlan, Guidance, sample
    from flowback.training import Evaluator, TrainResult, train

_MODULES = {
    "alignment.align": ("Alignment",),
    "alignment.encoders": ("Encoder", "Recipe", "create_encoder", "register_encoder"),
    "classification": ("classify",),
    "config": (
        *("AlignmentConfig", "DataConfig", "ModelConfig", "RunConfig", "SampleConfig", "TrainConfig"),
    ),
    "errors": ("InputError",),
    "flow": ("FlowOutput",),
    "model": ("Flow", "create_flow", "load"),
    "presets": ("list_presets",),
    "sampling": ("BlockPlan", "Guidance", "sample"),
    "training": ("Evaluator", "TrainResult", "train"),
}
"""Public names, by the module that defines them."""

_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "BlockPlan",
    "DataConfig",
    "Encoder",
    "Evaluator",
    "Flow",
    "FlowOutput",
    "Guidance",
    "InputError",
    "ModelConfig",
    "Recipe",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "classify",
    "create_encoder",
    "create_flow",
    "list_presets",
    "load",
    "register_encoder",
    "sample",
    "train",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flowback' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"flowback.{_HOME[name]}"), name)
    globals()[name] = value  # so that the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
