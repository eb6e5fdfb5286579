"""How the two losses pull on each block: size and angle of their gradients.

The paper blames the forward strategy's results on a tension between them (arXiv 2511.22345).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowback.alignment.loss import alignment_loss
from flowback.alignment.strategies import encode
from flowback.config import AlignmentConfig
from flowback.flow import Flow
from flowback.flow.block import Labels
from flowback.flow.likelihood import nll_per_dim

__all__ = ["gradient_balance"]


def gradient_balance(
    flow: Flow,
    projector: nn.Module,
    images: Float[Tensor, "b c h w"],
    labels: Labels,
    drop: Bool[Tensor, " b"] | None,
    targets: Float[Tensor, "b m f"],
    config: AlignmentConfig,
) -> dict[str, float]:
    """Gradients of nll and of the weighted alignment loss, block by block, on one batch.

    Costs two training steps, so it is meant for intervals. It leaves ``.grad`` alone and does not touch
    the generator of random numbers; on several processes it speaks of the caller's batch only.

    Returns:
        For block t: ``grad_nll_t`` and ``grad_alignment_t``, 2-norms over the block's parameters, the second
        with its weight, 0 where the strategy does not reach; and ``grad_cosine_t``, the cosine between the
        two, left out where one of them is 0. Below 0 the losses pull against each other.
    """
    blocks = [[p for p in block.parameters() if p.requires_grad] for block in flow.blocks]
    with torch.enable_grad():
        log_prob = flow(images, labels, drop).log_prob.mean()
        likelihood = _gradients(nll_per_dim(log_prob, flow.config.dims), blocks)
        hidden = encode(flow, images, labels, drop, config).hidden
        alignment = _gradients(config.weight * alignment_loss(hidden, targets, projector).loss, blocks)
    found: dict[str, float] = {}
    for t, (nll, aligned) in enumerate(zip(likelihood, alignment, strict=True), start=1):
        norms = float(nll.norm()), float(aligned.norm())
        found[f"grad_nll_{t}"], found[f"grad_alignment_{t}"] = norms
        if all(norms):
            found[f"grad_cosine_{t}"] = float(nll @ aligned) / (norms[0] * norms[1])
    return found


def _gradients(loss: Tensor, blocks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The gradient of each block's parameters, in one vector."""
    parameters = [parameter for block in blocks for parameter in block]
    gradients = iter(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return [torch.cat([next(gradients).flatten() for _ in block]) for block in blocks]
