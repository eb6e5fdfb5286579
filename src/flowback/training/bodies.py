"""Less memory and more speed for the Transformers of the blocks, which do almost all of the work."""

from __future__ import annotations

import os
import shutil

import torch._functorch.config as functorch

from flowback.config import RunConfig
from flowback.errors import InputError
from flowback.flow import Flow

__all__ = ["set_up_bodies"]


def set_up_bodies(flow: Flow, config: RunConfig) -> None:
    """Checkpoint activations and compile, as the settings ask.

    Checkpointing changes no bit of a gradient: each layer is computed twice by the same code. Compiled is the
    Transformer of each block; its projections, the affine transform and the alignment's graph stay eager.
    Compiled sums have another order, so results differ by rounding.

    Raises:
        InputError: there is no C++ compiler, and the CPU needs one.
    """
    for block in flow.blocks:
        block.body.checkpointing = config.train.checkpoint_activations
    if not config.train.compile:
        return
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if flow.device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise InputError(
            "--train.compile needs a C++ compiler, and none is here: install g++, or leave it out."
        )
    if config.alignment.active and config.alignment.strategy != "forward":
        functorch.donated_buffer = False  # their backward goes over a block's graph more than once
    for block in flow.blocks:
        block.body.compile()
