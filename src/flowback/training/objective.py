"""The training objective: the only place where losses are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from flowback.alignment.loss import Projector, alignment_loss
from flowback.alignment.strategies import encode
from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.flow import Location
from flowback.flow.block import Labels
from flowback.flow.likelihood import nll_per_dim
from flowback.model import Flow

__all__ = ["Losses", "Objective", "Targets", "weighted_mean"]


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
        """Features of the images ``seen``, on their device; patches in raster order."""
        ...


class Losses(NamedTuple):
    """Means over the images of a batch."""

    total: Float[Tensor, ""]
    """nll + weight · alignment: what is differentiated."""
    nll: Float[Tensor, ""]
    """Nats per dimension of the noised images, all constants included."""
    alignment: Float[Tensor, ""] | None
    """Minus the mean cosine between projected features and targets."""
    cosine: dict[Location, Float[Tensor, ""]]
    """Mean cosine at each location."""


@torch.no_grad()
def weighted_mean(parts: Sequence[tuple[float, Losses]]) -> Losses:
    """Losses of a batch from those of its parts and their shares, which sum to 1; without a graph."""

    def mean(value: Callable[[Losses], Tensor]) -> Tensor:
        return torch.stack([share * value(losses) for share, losses in parts]).sum()

    first = parts[0][1]
    return Losses(
        mean(lambda losses: losses.total),
        mean(lambda losses: losses.nll),
        None if first.alignment is None else mean(lambda losses: cast(Tensor, losses.alignment)),
        {place: mean(lambda losses: losses.cosine[place]) for place in first.cosine},  # noqa: B023 - called at once
    )


class Objective(nn.Module):
    """Likelihood and alignment of one batch: nll per dimension + weight · alignment (arXiv 2511.22345).

    Args:
        config: the run.
        target_dim: features of the encoder; None trains on likelihood alone.
    """

    projector: Projector | None

    def __init__(self, config: RunConfig, target_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.flow = Flow(config.model)
        self.projector = None
        if target_dim is not None:
            self.projector = Projector(config.model.width, config.alignment.hidden, target_dim)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        labels: Labels = None,
        drop: Bool[Tensor, " b"] | None = None,
        targets: Float[Tensor, "b m f"] | None = None,
    ) -> Losses:
        """Losses of images with their noise added; ``targets`` are the encoder's features of the clean."""
        dims = self.config.model.dims
        with torch.autocast(
            images.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"
        ):
            if self.projector is None or targets is None:
                nll = nll_per_dim(self.flow(images, labels, drop).log_prob, dims).mean()
                return Losses(nll, nll.detach(), None, {})
            out = encode(self.flow, images, labels, drop, self.config.alignment)
            nll = nll_per_dim(out.log_prob, dims).mean()
            aligned = alignment_loss(out.hidden, targets, self.projector)
        total = nll + self.config.alignment.weight * aligned.loss
        cosine = {location: value.detach() for location, value in aligned.cosine.items()}
        return Losses(total, nll.detach(), aligned.loss.detach(), cosine)
