"""What flows and their students have in common: a model's settings, images as tokens, labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowback.config import ModelConfig
from flowback.errors import InputError
from flowback.flow.block import Labels
from flowback.nn.patch import patchify, unpatchify

__all__ = ["ImageModel", "UserLabels"]

UserLabels = Tensor | Sequence[int] | Sequence[str] | int | str | None
"""Labels as users give them, not yet checked; a single one stands for all images."""


class ImageModel(nn.Module):
    """A model of images (B, C, H, W) on [-1, 1], with or without classes.

    Args:
        config: size, patches and classes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def data_dtype(self) -> torch.dtype:
        """Dtype of images, noise and likelihoods: that of the weights, but at least fp32."""
        return torch.promote_types(self.dtype, torch.float32)

    def tokens(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Images as tokens in raster order.

        Raises:
            InputError: what :meth:`check_images` refuses.
        """
        self.check_images(images)
        return patchify(images, self.config.patch_size)

    def check_images(self, images: object) -> None:
        """Refuse images that are no batch for this model, or not on [-1, 1].

        Raises:
            InputError: no tensor, whole numbers such as 8-bit values, or another shape than the model's.
        """
        if not isinstance(images, Tensor):
            raise InputError(
                f"The model takes images as a tensor, not {type(images).__name__}; give it through torch."
            )
        if not images.is_floating_point():
            raise InputError(
                f"The model takes images on [-1, 1], not {str(images.dtype).removeprefix('torch.')}; "
                "give flowback.to_unit_range of 8-bit values."
            )
        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise InputError(
                f"The model takes images of shape (B, {', '.join(map(str, shape))}), "
                f"not {tuple(images.shape)}; resize them, or load another checkpoint."
            )

    def images(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b c h w"]:
        """Tokens in raster order as images."""
        return unpatchify(tokens, self.config.patch_size)

    def labels(self, labels: UserLabels, batch: int) -> Labels:
        """Labels from a user, checked, as a tensor on the flow's device.

        Raises:
            InputError: ids out of range, a wrong count, or weights of another number of classes.
        """
        if labels is None:
            return None
        classes = self.config.num_classes or 0
        if not classes:
            raise InputError("This model is unconditional: it has no classes. Leave the labels out.")
        values = torch.as_tensor(labels, device=self.device)
        if values.ndim == 0:
            values = values.expand(batch)
        if values.shape[0] != batch:
            raise InputError(f"{values.shape[0]} labels for {batch} images; give one label per image.")
        if values.is_floating_point():
            if values.shape[1:] != (classes,):
                raise InputError(
                    f"Class weights have shape {tuple(values.shape)}; the model has {classes} classes."
                )
            if not bool(values.isfinite().all()):
                raise InputError("The class weights are not all finite; give numbers that sum to 1.")
            return values.to(self.dtype)
        if values.ndim != 1:
            raise InputError(f"Labels have shape {tuple(values.shape)}; give one id per image.")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
            wrong = int(values.max() if int(values.max()) >= classes else values.min())
            raise InputError(
                f"Label {wrong} is out of range: "
                f"the model's classes go from 0 to {classes - 1} (None is unconditional)."
            )
        return values.long()
