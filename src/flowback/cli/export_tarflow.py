"""``flowback export-tarflow``: a file for the original TARFlow code from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import load_file

from flowback import checkpoint
from flowback.cli.output import say
from flowback.errors import InputError
from flowback.interop import to_tarflow, write_tarflow

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Write a checkpoint's weights for the original TARFlow code; of a trained model, the averaged ones."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    out: tyro.conf.Positional[Path]
    """The .pth file to write; replaced if it exists."""


def run(argv: list[str]) -> None:
    """Read, convert, write."""
    options = tyro.cli(Options, args=argv, prog="flowback export-tarflow")
    if options.out.is_dir():
        raise InputError(f"{options.out} is a folder; give the name of a .pth file.")
    config = checkpoint.load(options.checkpoint).config  # checks that config and weights fit together
    weights = load_file(checkpoint.resolve(options.checkpoint) / "model.safetensors")  # in their own dtype
    state = to_tarflow(config, weights)
    write_tarflow(options.out, state)
    say(f"{options.out}: {len(state)} tensors in the layout of the original TARFlow code.")
