"""``flowback import-tarflow`` and ``export-tarflow``: weights of the original TARFlow and iTARFlow code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flowback.cli.console import say
from flowback.cli.options import parse
from flowback.config import DataConfig, RunConfig
from flowback.errors import InputError

__all__ = ["ExportOptions", "ImportOptions", "run_export", "run_import"]


@dataclass(frozen=True)
class ImportOptions:
    """Read weights of the original TARFlow or iTARFlow code into a checkpoint folder, for all other verbs.

    The file does not record sizes and noise, so give those that the model was trained with.
    """

    weights: tyro.conf.Positional[Path]
    """The .pth file with the model's state dict."""
    out: tyro.conf.Positional[Path]
    """The checkpoint folder to write; must not exist yet."""
    image_size: int
    """Height and width of the images."""
    patch_size: int
    """Side of the patches."""
    noise: Literal["gaussian", "uniform"] = "gaussian"
    """Noise that the model was trained with."""
    noise_std: float = 0.05
    """Standard deviation of the Gaussian noise, on the [-1, 1] scale."""
    noise_range: tuple[float, float] | None = None
    """Lowest and highest noise level that an iTARFlow was trained with, in place of the two above."""


def run_import(argv: list[str]) -> None:
    """Read, convert, write."""
    options = parse(ImportOptions, argv, "import-tarflow")
    if options.image_size < 1 or options.patch_size < 1:
        raise InputError("--image-size and --patch-size must be at least 1.")
    if options.noise_std < 0:
        raise InputError("--noise-std must not be negative.")
    if options.noise_range is not None and not 0 < options.noise_range[0] < options.noise_range[1]:
        raise InputError("--noise-range takes two levels, the first above 0 and below the second.")
    if options.out.exists():
        raise InputError(f"{options.out} already exists; give a new folder, or remove it first.")
    from flowback import checkpoint
    from flowback.data.load import UNNAMED
    from flowback.flow.cost import parameters
    from flowback.tarflow_weights import read_tarflow

    noise = options.noise, options.noise_std, options.noise_range
    model, weights = read_tarflow(options.weights, options.image_size, options.patch_size, *noise)
    checkpoint.save(options.out, RunConfig(model, DataConfig(UNNAMED)), weights)
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    layers = model.layers if isinstance(model.layers, int) else ", ".join(map(str, model.layers))
    say(
        f"{options.out}: {model.blocks} blocks of {layers} layers, width {model.width}, "
        f"{model.channels}x{model.image_size}x{model.image_size} images, {model.tokens} tokens, {classes}, "
        f"{parameters(model) / 1e6:.1f} M parameters."
    )


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint's weights for the original code; of a trained model, the averaged ones.

    A flow with a range of noise levels is written for iTARFlow's code, any other for TARFlow's.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    out: tyro.conf.Positional[Path]
    """The .pth file to write; replaced if it exists."""


def run_export(argv: list[str]) -> None:
    """Read, convert, write."""
    options = parse(ExportOptions, argv, "export-tarflow")
    if options.out.is_dir():
        raise InputError(f"{options.out} is a folder; give the name of a .pth file.")
    from safetensors.torch import load_file

    from flowback import checkpoint
    from flowback.model import Flow
    from flowback.tarflow_weights import to_tarflow, write_tarflow

    config = Flow.from_pretrained(options.checkpoint).config  # checks that config and weights fit together
    weights = load_file(checkpoint.resolve(options.checkpoint) / "model.safetensors")  # in their own dtype
    state = to_tarflow(config, weights)
    write_tarflow(options.out, state)
    original = "iTARFlow" if config.noise == "range" else "TARFlow"
    say(f"{options.out}: {len(state)} tensors in the layout of the original {original} code.")
