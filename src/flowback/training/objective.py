"""What a run trains, a flow: the losses of a batch, and where the encoder's features come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from flowback.alignment.align import Losses, Noised, losses
from flowback.alignment.loss import make_projector
from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.flow.block import Labels
from flowback.flow.levels import loss_weights
from flowback.model import Flow
from flowback.nn.transformer import Transformer
from flowback.training.monitoring import block_statistics, step_flops

__all__ = ["Objective", "Targets", "weighted_mean"]


@runtime_checkable
class Targets(Protocol):
    """Features of a batch's clean images."""

    dim: int

    @property
    def originals(self) -> ImageSet | None:
        """What the encoder is to see in place of the flow's images: the same ones, at another size."""
        ...

    def __call__(
        self, indices: Int64[Tensor, " b"], flipped: Bool[Tensor, " b"], seen: Float[Tensor, "b c p q"]
    ) -> Float[Tensor, "b m f"]:
        """Features of the images ``seen``, on their device; patches in raster order.

        ``indices`` and ``flipped`` are on the CPU.
        """
        ...


Means = TypeVar("Means", bound=tuple[Any, ...])
"""A named tuple of means over images, values of each image, dicts of them, None."""


@torch.no_grad()
def weighted_mean(parts: Sequence[tuple[float, Means]]) -> Means:
    """Losses of a batch from those of its parts, in order, and shares that sum to 1; without a graph."""
    shares = [share for share, _ in parts]

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Tensor):
            if values[0].ndim:  # a value of each image
                return torch.cat(list(values))
            return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()
        if isinstance(values[0], dict):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        return None

    kind: Any = type(parts[0][1])
    return cast("Means", kind(*map(mean, zip(*(part for _, part in parts), strict=True))))


class Objective(nn.Module):
    """Flow and projector as one module, whose call gives the losses of a batch.

    Args:
        config: the run.
        target_dim: features of the encoder; None trains on likelihood alone.
    """

    projector: nn.Module | None

    def __init__(self, config: RunConfig, target_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.flow = Flow(config.model, config.classes)
        self.projector = None
        if target_dim is not None:
            self.projector = make_projector(config.alignment, config.model.width, target_dim)

    @property
    def trained(self) -> Flow:
        """What is averaged, kept and used later."""
        return self.flow

    @property
    def bodies(self) -> list[Transformer]:
        """The Transformers, from the data on."""
        return [block.body for block in self.flow.blocks]

    @property
    def gathered_alone(self) -> list[Transformer]:
        """Of a sharded run, the bodies that are whole only while they run.

        The backward pass of the blocks from the lowest aligned one on goes over their graphs several times
        (:mod:`flowback.alignment.strategies`), and FSDP2 would take the first time for the last.
        """
        config = self.config.alignment
        if self.projector is None or config.strategy == "forward":
            return self.bodies
        return self.bodies[: min(block for block, _ in config.locations) - 1]

    @property
    def parameter_counts(self) -> dict[str, int]:
        """Number of weights, by what they are in."""
        counted = {"in the flow": self.flow, "in the projector": self.projector}
        return {name: sum(p.numel() for p in m.parameters()) for name, m in counted.items() if m is not None}

    @property
    def step_flops(self) -> int:
        """Floating-point operations of one step of the whole batch."""
        return step_flops(self.config)

    def statistics(self, batch: Noised) -> dict[str, float]:
        """The health of the blocks on a batch."""
        return block_statistics(self.flow, batch)

    def weights(self, levels: Float[Tensor, " b"] | None) -> Float[Tensor, " b"] | None:
        """Weights of the images' likelihoods in the loss; None: all 1."""
        return None if levels is None else loss_weights(levels, self.config.model, self.config.train)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        labels: Labels = None,
        drop: Bool[Tensor, " b"] | None = None,
        targets: Float[Tensor, "b m f"] | None = None,
        weight: float | None = None,
        levels: Float[Tensor, " b"] | None = None,
        alignment_weights: Float[Tensor, " b"] | None = None,
    ) -> Losses:
        """Losses of images with their noise added.

        Args:
            images: noised, on [-1, 1].
            labels: ids or class weights; None is unconditional.
            drop: True where an image's label is replaced by the unconditional embedding.
            targets: the encoder's features of the clean images; None where nothing is aligned any more.
            weight: of the alignment loss; None is that of the settings.
            levels: noise levels of the images, for a flow with a range of them.
            alignment_weights: of the images in the alignment loss; None: all 1.
        """
        config, bf16 = self.config.alignment, self.config.train.precision == "bf16"
        batch = Noised(images, labels, drop, levels, self.weights(levels), alignment_weights)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            batch_losses = losses(self.flow, self.projector, config, batch, targets, weight)
        if self.projector is not None and targets is None:
            # Nothing is aligned any more; several processes still wait for a gradient of every weight.
            nothing = torch.stack([p.sum() for p in self.projector.parameters()]).sum() * 0
            batch_losses = batch_losses._replace(loss=batch_losses.loss + nothing)
        return batch_losses
