"""Likelihood and alignment of a batch as one loss: nll per dimension + weight · alignment (arXiv 2511.22345).

Letters in shapes: b images, n flow tokens, m encoder patches, w width of the flow, f width of the encoder.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowback.alignment.encoders import Encoder
from flowback.alignment.loss import alignment_loss, alignment_weights, make_projector
from flowback.alignment.strategies import encode
from flowback.config import AlignmentConfig, ModelConfig, RunConfig
from flowback.errors import InputError
from flowback.flow import FlowOutput, Location, TARFlow
from flowback.flow.block import Labels
from flowback.flow.levels import UserLevels
from flowback.flow.likelihood import nll_per_dim
from flowback.flow.tarflow import UserLabels

__all__ = ["Alignment", "Losses", "Noised", "losses", "weight_at"]


class Noised(NamedTuple):
    """Noised images, and what is known of them."""

    images: Float[Tensor, "b c h w"]
    """On [-1, 1]."""
    labels: Labels = None
    """Ids or class weights; None is unconditional."""
    drop: Bool[Tensor, " b"] | None = None
    """True where an image's label is replaced by the unconditional embedding."""
    levels: Float[Tensor, " b"] | None = None
    """Noise levels, for a flow with a range of them."""
    weights: Float[Tensor, " b"] | None = None
    """Of each image's likelihood in the loss; None: all 1."""
    alignment_weights: Float[Tensor, " b"] | None = None
    """Of each image in the alignment loss; None: all 1."""


class Losses(NamedTuple):
    """Means over the images of a batch, and values of each; call ``loss.backward()`` once."""

    loss: Float[Tensor, ""]
    """Weighted nll + weight · alignment: what is differentiated."""
    nll: Float[Tensor, ""]
    """Nats per dimension of the noised images, unweighted, all constants included; without a graph."""
    alignment: Float[Tensor, ""] | None
    """Minus the mean cosine between projected features and targets, over the images whose noise level counts,
    without its weight; without a graph."""
    cosines: dict[Location, Float[Tensor, ""]]
    """Mean cosine at each location; without a graph."""
    image_nll: Float[Tensor, " b"]
    """nll of each image; without a graph."""
    image_cosine: Float[Tensor, " b"] | None
    """Mean cosine of each image, whether it counts or not; without a graph."""

    @property
    def figures(self) -> dict[str, Float[Tensor, ""]]:
        """What a run records, by name."""
        if self.alignment is None:
            return {"nll": self.nll}
        cosines = {f"cosine_{block}_{layer}": value for (block, layer), value in self.cosines.items()}
        return {"nll": self.nll, "alignment": self.alignment, **cosines}

    @property
    def cosine(self) -> Float[Tensor, ""] | None:
        """Mean cosine over all locations."""
        return None if self.alignment is None else -self.alignment


def weight_at(config: AlignmentConfig, step: int) -> float:
    """Weight of the alignment loss at a step, counted from 0; 0 where nothing is aligned.

    Example:
        >>> from flowback import AlignmentConfig
        >>> config = AlignmentConfig(strategy="reverse", weight=0.5, stop_at=100, decay="linear")
        >>> [weight_at(config, step) for step in (0, 50, 100, 150)]
        [0.5, 0.25, 0.0, 0.0]
    """
    if not config.active or (config.stop_at is not None and step >= config.stop_at):
        return 0.0
    if config.decay == "none" or config.stop_at is None:
        return config.weight
    done = step / config.stop_at
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.weight * left


def losses(
    flow: TARFlow,
    projector: nn.Module | None,
    config: AlignmentConfig,
    batch: Noised,
    targets: Float[Tensor, "b m f"] | None = None,
    weight: float | None = None,
) -> Losses:
    """Losses of noised images; only that of the likelihood if nothing is aligned.

    Args:
        flow: the model.
        projector: flow features to the encoder's space.
        config: strategy, order, weight and locations.
        batch: the images.
        targets: the encoder's features of the clean images.
        weight: of the alignment loss at this step; None is ``config.weight``.
    """
    images, labels, drop, levels, weights = batch[:5]
    if projector is None or targets is None or config.strategy == "none":
        loss, nll, image_nll = _likelihood(flow, flow(images, labels, drop, noise=levels), weights)
        return Losses(loss, nll, None, {}, image_nll, None)
    out = encode(flow, images, labels, drop, config, levels)
    loss, nll, image_nll = _likelihood(flow, out, weights)
    aligned = alignment_loss(out.hidden, targets, projector, config.spatial_norm, batch.alignment_weights)
    total = loss + (config.weight if weight is None else weight) * aligned.loss
    return Losses(total, nll, aligned.loss.detach(), aligned.cosine, image_nll, aligned.image_cosine)


def _likelihood(flow: TARFlow, out: FlowOutput, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The nll per dimension: its weighted mean; without a graph, its mean, and that of each image."""
    values = nll_per_dim(out.log_prob, flow.config.dims)
    nll = values.mean()
    return nll if weights is None else (weights * values).mean(), nll.detach(), values.detach()


class Alignment(nn.Module):
    """Aligns a flow's features with those of a frozen encoder, in a training loop of your own.

    Its only parameters are the projector's: train them with the flow's. Each call encodes a batch and gives
    the losses; ``strategy="reverse"`` with ``order="exact"`` is the gradient of the generative pass.

    Args:
        config: the flow's settings.
        encoder: sees the clean images; None if you give features as ``targets``.
        target_dim: width of such features; not needed with an encoder.
        settings: all options of the alignment; None takes the defaults of :class:`flowback.AlignmentConfig`
            with strategy ``reverse`` at the last layer of the last block.
        **options: fields of :class:`flowback.AlignmentConfig` that replace those of ``settings``.

    Raises:
        InputError: a location outside the flow, a value out of range, neither encoder nor width, or means
            to subtract.

    Example:
        >>> import torch, flowback
        >>> flow = flowback.create_flow("digits", num_classes=10)
        >>> align = flowback.Alignment(flow.config, strategy="reverse", order="exact", hidden=64,
        ...                            locations=[(3, 2), (4, 2)], target_dim=24)
        >>> images, features = torch.zeros(2, 1, 8, 8), torch.ones(2, 16, 24)
        >>> out = align(flow, flow.add_noise(images, seeds=[0, 1]), [3, 7], targets=features)
        >>> out.loss.backward()
        >>> bool(flow.blocks[3].proj_in.weight.grad.isfinite().all())
        True
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder | None = None,
        target_dim: int | None = None,
        settings: AlignmentConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        base = settings or AlignmentConfig(strategy="reverse", locations=(config.locations[-1],))
        self.settings = RunConfig(model=config, alignment=replace(base, **options)).alignment
        if self.settings.subtract != "nothing":
            raise InputError(
                "Alignment does not know your training images, whose means alignment.subtract takes from the "
                "features; subtract them yourself and give the rest as targets=..."
            )
        dim = encoder.dim if encoder is not None else target_dim
        if dim is None:
            raise InputError("Alignment needs an encoder, or the width of your own features as target_dim.")
        self.projector = make_projector(self.settings, config.width, dim)
        self.grid = self.settings.grid or config.grid
        """Encoder patches along one side."""
        self._encoder = [encoder]  # in a list, which keeps it out of parameters() and state_dict()

    @property
    def encoder(self) -> Encoder | None:
        """The frozen encoder; it follows the images to their device."""
        return self._encoder[0]

    def forward(
        self,
        flow: TARFlow,
        images: Float[Tensor, "b c h w"],
        labels: UserLabels = None,
        drop: Bool[Tensor, " b"] | None = None,
        *,
        clean: Float[Tensor, "b c p q"] | None = None,
        targets: Float[Tensor, "b m f"] | None = None,
        noise: UserLevels = None,
        weights: Float[Tensor, " b"] | None = None,
    ) -> Losses:
        """Losses of a batch; call ``.loss.backward()`` once, on all of it.

        Args:
            flow: the model.
            images: on [-1, 1], with the noise of training (:meth:`flowback.Flow.add_noise`).
            labels: class ids, names or weights; None is unconditional.
            drop: True where an image's label is replaced by the unconditional embedding.
            clean: the same images without noise, of any size, for the encoder.
            targets: the encoder's features of them, in place of ``clean``.
            noise: its level, for a flow with a range of them. Tensors are taken as they are.
            weights: of each image's likelihood in the loss; None: all 1.

        Raises:
            InputError: neither clean images nor features, or a noise level that the flow does not have.
        """
        if targets is None:
            if clean is None or self.encoder is None:
                raise InputError(
                    "Give the clean images as clean=..., or the encoder's features as targets=..."
                )
            targets = self.encoder.to(clean.device)(clean, self.grid)
        if labels is not None and not isinstance(labels, Tensor):
            labels = flow.labels(labels, len(images))
        levels = flow.levels(noise, len(images), trusted=True)
        batch = Noised(images, labels, drop, levels, weights, alignment_weights(levels, self.settings))
        return losses(flow, self.projector, self.settings, batch, targets)

    def extra_repr(self) -> str:
        """Strategy, order and locations, for ``print``."""
        settings = self.settings
        return f"strategy={settings.strategy}, order={settings.order}, locations={settings.locations}"
