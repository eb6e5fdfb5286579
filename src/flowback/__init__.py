"""Normalizing flows that generate images and understand them.

TARFlow (arXiv 2412.06329), trained on likelihood alone, or with its features aligned to those of a frozen
vision encoder (arXiv 2511.22345). Images are tensors (B, C, H, W) on [-1, 1].

Create a flow, or load a trained one (a run, a checkpoint, one that comes along, or ``owner/name`` on the
Hugging Face Hub):

    flow = flowback.create_flow("digits", num_classes=10)
    flow = flowback.load("fashion")

Train a preset, or add alignment to a training loop of your own:

    flow = flowback.train(flowback.get_preset("digits-reverse").config, out="runs/digits").flow
    align = flowback.Alignment(flow.config, flowback.create_encoder())
    align(flow, flow.add_noise(images, seeds), labels, clean=images).loss.backward()

Sample, classify, evaluate:

    images = flow.sample(labels=[3, 7], seeds=[0, 1], guidance=1.5)
    classes = flowback.classify(flow, images).argmax(1)
    report = flowback.evaluate(flow, samples=1000)

Names are loaded when they are first used, so ``import flowback`` costs nothing.
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
        StudentConfig,
        TrainConfig,
    )
    from flowback.data.image_set import ImageSet, PixelSet, image_set
    from flowback.data.load import load_images
    from flowback.data.named_sets import register_dataset
    from flowback.data.pixels import to_pil, to_unit_range
    from flowback.errors import InputError
    from flowback.evaluation.by_level import LevelAccuracy, accuracy_by_level
    from flowback.evaluation.held_out import Accuracy, accuracy
    from flowback.evaluation.linear_probe import Probe, probe
    from flowback.evaluation.pipeline import evaluate, evaluate_images
    from flowback.evaluation.predictions import Prediction, predict
    from flowback.evaluation.references import Reference
    from flowback.evaluation.report import Report
    from flowback.flow import FlowOutput
    from flowback.flow_pipeline import FlowPipeline, FlowPipelineOutput
    from flowback.model import Flow, Student, create_flow, load
    from flowback.model_card import Card
    from flowback.presets import get_preset, list_presets
    from flowback.processes import Processes
    from flowback.sample_folder import draw_folder
    from flowback.sampling import (
        BlockPlan,
        Denoising,
        Guidance,
        Inpainted,
        Sampler,
        plan_sampling,
        sample,
    )
    from flowback.tables import reproduce
    from flowback.task_config import EvaluateConfig, ProbeConfig, SampleConfig
    from flowback.training import Evaluator, TrainResult, Trial, distil, train, try_run

_MODULES = {
    "alignment.align": ("Alignment",),
    "alignment.encoders": ("Encoder", "Recipe", "create_encoder", "register_encoder"),
    "classification": ("classify",),
    "config": ("AlignmentConfig", "DataConfig", "ModelConfig", "RunConfig", "StudentConfig", "TrainConfig"),
    "data.image_set": ("ImageSet", "PixelSet", "image_set"),
    "data.load": ("load_images",),
    "data.named_sets": ("register_dataset",),
    "data.pixels": ("to_pil", "to_unit_range"),
    "errors": ("InputError",),
    "evaluation.by_level": ("LevelAccuracy", "accuracy_by_level"),
    "evaluation.held_out": ("Accuracy", "accuracy"),
    "evaluation.linear_probe": ("Probe", "probe"),
    "evaluation.pipeline": ("evaluate", "evaluate_images"),
    "evaluation.predictions": ("Prediction", "predict"),
    "evaluation.references": ("Reference",),
    "evaluation.report": ("Report",),
    "flow": ("FlowOutput",),
    "flow_pipeline": ("FlowPipeline", "FlowPipelineOutput"),
    "model": ("Flow", "Student", "create_flow", "load"),
    "model_card": ("Card",),
    "presets": ("get_preset", "list_presets"),
    "processes": ("Processes",),
    "sample_folder": ("draw_folder",),
    "sampling": ("BlockPlan", "Denoising", "Guidance", "Inpainted", "Sampler", "plan_sampling", "sample"),
    "tables": ("reproduce",),
    "task_config": ("EvaluateConfig", "ProbeConfig", "SampleConfig"),
    "training": ("Evaluator", "TrainResult", "Trial", "distil", "train", "try_run"),
}
"""Public names, by the module that defines them."""

_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Accuracy",
    "Alignment",
    "AlignmentConfig",
    "BlockPlan",
    "Card",
    "DataConfig",
    "Denoising",
    "Encoder",
    "EvaluateConfig",
    "Evaluator",
    "Flow",
    "FlowOutput",
    "FlowPipeline",
    "FlowPipelineOutput",
    "Guidance",
    "ImageSet",
    "Inpainted",
    "InputError",
    "LevelAccuracy",
    "ModelConfig",
    "PixelSet",
    "Prediction",
    "Probe",
    "ProbeConfig",
    "Processes",
    "Recipe",
    "Reference",
    "Report",
    "RunConfig",
    "SampleConfig",
    "Sampler",
    "Student",
    "StudentConfig",
    "TrainConfig",
    "TrainResult",
    "Trial",
    "__version__",
    "accuracy",
    "accuracy_by_level",
    "classify",
    "create_encoder",
    "create_flow",
    "distil",
    "draw_folder",
    "evaluate",
    "evaluate_images",
    "get_preset",
    "image_set",
    "list_presets",
    "load",
    "load_images",
    "plan_sampling",
    "predict",
    "probe",
    "register_dataset",
    "register_encoder",
    "reproduce",
    "sample",
    "to_pil",
    "to_unit_range",
    "train",
    "try_run",
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
