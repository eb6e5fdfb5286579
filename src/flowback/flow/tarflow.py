"""TARFlow: a stack of autoregressive blocks with alternating token orders (arXiv 2412.06329)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flowback.config import ModelConfig
from flowback.errors import InputError
from flowback.flow.block import Block, BlockOutput, Labels
from flowback.flow.image_model import ImageModel, UserLabels
from flowback.flow.levels import UserLevels, checked_levels
from flowback.flow.likelihood import log_prior

__all__ = ["FlowOutput", "Location", "TARFlow", "UserLabels"]

Location = tuple[int, int]
"""(block, layer), counted from 1; block 1 is next to the data."""


@dataclass(frozen=True)
class FlowOutput:
    """Result of the encode pass."""

    z: Float[Tensor, "b n d"]
    """The image as noise: tokens in raster order."""
    log_det: Float[Tensor, " b"]
    """log|det dz/dx| in nats, summed over dimensions."""
    hidden: dict[Location, Float[Tensor, "b n w"]]
    """Outputs of the chosen layers, tokens in raster order."""

    @property
    def log_prob(self) -> Float[Tensor, " b"]:
        """Log-density of each image on the [-1, 1] scale, in nats."""
        return log_prior(self.z) + self.log_det


class TARFlow(ImageModel):
    """A class-conditional or unconditional TARFlow.

    Images are (B, C, H, W) on [-1, 1]. Labels are class ids (B,), soft class weights (B, K), or None for
    unconditional; they mean the same in both directions. Calls keep no state.

    Example:
        >>> import torch
        >>> from flowback import Flow, ModelConfig
        >>> flow = Flow(ModelConfig(image_size=8, channels=1, patch_size=2, width=32, blocks=2,
        ...                         layers=1, head_dim=16, num_classes=10))
        >>> images = torch.zeros(3, 1, 8, 8)
        >>> out = flow(images, torch.tensor([0, 1, 2]))
        >>> out.z.shape, out.log_det.shape
        (torch.Size([3, 16, 4]), torch.Size([3]))
        >>> torch.allclose(flow.inverse(out.z, [0, 1, 2]), images, atol=1e-5)
        True
    """

    blocks: Sequence[Block]
    """Block 1 (next to the data) first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        blocks = [Block(config, depth, flip=index % 2 == 1) for index, depth in enumerate(config.depths)]
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))

    def levels(self, noise: UserLevels, batch: int, trusted: bool = False) -> Float[Tensor, " b"] | None:
        """Noise levels from a user, checked, as a tensor on the flow's device; None for a flow of one level.

        Args:
            noise: one for all images, one an image, or None; a flow of one level takes None, or that level.
            batch: number of images.
            trusted: take a tensor as it is, so that a training step does not wait for the device.

        Raises:
            InputError: no level for a flow with a range, one outside of it, another than the flow's only one,
                or a wrong count.
        """
        if trusted and isinstance(noise, Tensor) and self.config.noise == "range":
            return noise
        if noise is None and self.config.noise != "range":
            return None
        like = torch.empty(0, dtype=self.data_dtype, device=self.device)
        return checked_levels(self.config, noise, batch, like)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        labels: UserLabels = None,
        drop: Bool[Tensor, " b"] | None = None,
        hidden: Collection[Location] = (),
        *,
        noise: UserLevels = None,
    ) -> FlowOutput:
        """Encode: images to noise, with the log-determinant.

        Args:
            images: on [-1, 1], with the training noise added.
            labels: class ids, soft class weights, or None. Tensors are taken as they are, so that a training
                step does not wait for the device; lists are checked.
            drop: True where an image's label is replaced by the unconditional embedding.
            hidden: (block, layer) pairs whose outputs are returned.
            noise: levels of the noise on the images, for a flow with a range of them. Tensors are taken as
                they are; a number is checked.

        Raises:
            InputError: images of another kind or shape, or labels, noise levels or places in ``hidden`` that
                the flow does not have.
        """
        self.check_images(images)
        for place in set(hidden).difference(self.config.locations):
            raise InputError(f"hidden: {place} is outside the model; {self.config.locations_in_words}.")
        if labels is not None and not isinstance(labels, Tensor):
            labels = self.labels(labels, len(images))
        levels = self.levels(noise, len(images), trusted=True)
        z = self.tokens(images)
        log_det = torch.zeros(len(z), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        states: dict[Location, Tensor] = {}
        for index, output in enumerate(self.encode_blocks(z, labels, drop, hidden, levels), start=1):
            z, log_det = output.z, log_det + output.log_det
            states.update({(index, layer): state for layer, state in output.hidden.items()})
        return FlowOutput(z, log_det, states)

    def encode_blocks(
        self,
        x: Float[Tensor, "b n d"],
        labels: Labels = None,
        drop: Bool[Tensor, " b"] | None = None,
        hidden: Collection[Location] = (),
        levels: Float[Tensor, " b"] | None = None,
    ) -> Iterator[BlockOutput]:
        """The outputs of blocks 1 ... T, one after another; a block runs when its output is asked for.

        Args:
            x: the images' tokens, from :meth:`tokens`.
            labels: class ids, soft class weights, or None, as tensors.
            drop: True where an image's label is replaced by the unconditional embedding.
            hidden: (block, layer) pairs whose outputs are returned.
            levels: noise levels, from :meth:`levels`.
        """
        for index, block in enumerate(self.blocks, start=1):
            layers = [layer for t, layer in hidden if t == index]
            output = block(x, block.context(labels, drop, levels), layers)
            yield output
            x = output.z

    @torch.no_grad()
    def inverse(
        self, z: Float[Tensor, "b n d"], labels: UserLabels = None, *, noise: UserLevels = None
    ) -> Float[Tensor, "b c h w"]:
        """Decode: the images whose encoding is ``z``. Exact; one token after another.

        ``labels`` and ``noise`` are those of the encoding.
        """
        checked, levels = self.labels(labels, len(z)), self.levels(noise, len(z))
        for block in reversed(self.blocks):
            z = block.inverse(z, block.context(checked, levels=levels))
        return self.images(z)

    def log_prob(
        self, images: Float[Tensor, "b c h w"], labels: UserLabels = None, *, noise: UserLevels = None
    ) -> Float[Tensor, " b"]:
        """Log-density of each image in nats, on the [-1, 1] scale, at the level of the noise on it.

        Example:
            >>> import torch
            >>> from flowback import Flow, ModelConfig
            >>> flow = Flow(ModelConfig(image_size=4, channels=1, patch_size=2, width=16, blocks=1,
            ...                         layers=1, head_dim=16, num_classes=0))
            >>> flow.log_prob(torch.zeros(2, 1, 4, 4)).shape
            torch.Size([2])
        """
        self.check_images(images)
        checked, levels = self.labels(labels, len(images)), self.levels(noise, len(images))
        return self(images, checked, noise=levels).log_prob
