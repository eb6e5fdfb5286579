"""Steps that must not reach the weights, and signs that a flow is about to fail."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.flow import Flow, affine
from flowback.flow.block import Labels

__all__ = ["Guard", "block_statistics"]

MEMORY = 0.98
"""Decay of the running mean of gradient norms: about 50 steps."""


class Guard:
    """Judges each step by its gradient norm, without waiting for the device.

    The norm is taken after the gradients of all processes are joined, so all come to the same verdict. A bad
    step is left out on the device itself; the tally is read only when somebody looks.

    Args:
        spike: a norm above so many times the running mean is bad; None judges finiteness alone.
        device: where the norms are.
    """

    def __init__(self, spike: float | None, device: torch.device) -> None:
        self.spike = spike
        self.typical = torch.zeros((), device=device)
        """Running mean of the good norms; 0 before the first."""
        self.bad = torch.zeros((), dtype=torch.int64, device=device)
        """Bad steps so far."""
        self.last = torch.zeros((), dtype=torch.int64, device=device)
        """The last bad step; 0 for none."""

    def judge(self, norm: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
        """1 for a bad step, else 0, on the device; ``step`` is counted from 1."""
        norm = norm.detach().float()
        bad = ~torch.isfinite(norm)
        if self.spike is not None:
            bad = bad | ((self.typical > 0) & (norm > self.spike * self.typical))
        mean = torch.where(self.typical > 0, MEMORY * self.typical + (1 - MEMORY) * norm, norm)
        self.typical = torch.where(bad, self.typical, mean)
        self.bad = self.bad + bad
        self.last = torch.where(bad, step, self.last)
        return bad.float()

    def state_dict(self) -> dict[str, Tensor]:
        """The tally, for the checkpoint."""
        return {"typical": self.typical, "bad": self.bad, "last": self.last}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with a stored tally."""
        device = self.typical.device
        self.typical, self.bad, self.last = (state[name].to(device) for name in ("typical", "bad", "last"))


@torch.no_grad()
def block_statistics(flow: Flow, images: Float[Tensor, "b c h w"], labels: Labels = None) -> dict[str, float]:
    """Size of each block's output and range of its log-scales on a batch; one more encode pass.

    Returns:
        For block t: ``z2_t``, mean of its squared output (1 is the prior's, at the last block), and
        ``log_scale_min_t`` and ``log_scale_max_t``. Log-scales that run away come before NaN does.
    """
    x = flow.tokens(images)
    found: dict[str, Tensor] = {}
    for t, block in enumerate(flow.blocks, start=1):
        predicted = block.predict(x, block.context(labels))
        x = affine.forward(x, predicted.shift, predicted.log_scale)
        found[f"z2_{t}"] = x.square().mean()
        found[f"log_scale_min_{t}"] = predicted.log_scale.min()
        found[f"log_scale_max_{t}"] = predicted.log_scale.max()
    return {name: float(value) for name, value in found.items()}
