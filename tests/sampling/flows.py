"""Flows that tests of sampling share."""

import torch

from reference import random_flow


def tame_flow(dtype=torch.float64, **changes):
    """A random flow whose inverse of standard normal noise stays small enough to compare."""
    flow = random_flow(dtype, **changes)
    for block in flow.blocks:
        block.proj_out.weight.data.mul_(0.4)
    return flow


def noise_of(flow, batch):
    return torch.randn(batch, flow.config.tokens, flow.config.token_dim, dtype=flow.dtype)


def labels_of(flow, batch):
    return torch.arange(batch) % flow.config.num_classes if flow.config.num_classes else None
