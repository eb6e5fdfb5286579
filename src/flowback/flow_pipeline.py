"""A flow that is called as the pipelines of diffusers are: ``pipe(class_labels=[207]).images``.

Thin: the images are those of :func:`flowback.sample`, and diffusers is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowback.checked import require, require_one_of
from flowback.config import RunConfig
from flowback.data.pixels import to_bytes
from flowback.data.vae import open_codec
from flowback.model import Flow

__all__ = ["FlowPipeline", "FlowPipelineOutput"]

OutputType = Literal["pil", "np", "pt"]


@dataclass(frozen=True)
class FlowPipelineOutput:
    """What a pipeline drew."""

    images: list[Image.Image] | np.ndarray | Tensor
    """`pil`: a list of images; `np`: (B, H, W, C) on [0, 1]; `pt`: (B, C, H, W) on [0, 1]."""


class FlowPipeline:
    """Draw images with a flow, and with its VAE if it models latents.

    Args:
        flow: the model; its device is where the work is done.

    Raises:
        InputError: the flow's VAE cannot be loaded.

    Example:
        >>> import flowback, torch
        >>> pipe = flowback.FlowPipeline.from_pretrained("fashion")
        >>> images = pipe(class_labels=["Bag", 9], generator=torch.Generator().manual_seed(0)).images
        >>> [(image.size, image.mode) for image in images]
        [((28, 28), 'L'), ((28, 28), 'L')]
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.codec = open_codec((flow.run or RunConfig()).codec, flow.device)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> FlowPipeline:
        """A pipeline of a trained flow; arguments as in :meth:`flowback.Flow.from_pretrained`."""
        return cls(Flow.from_pretrained(name, **options))

    def to(self, device: torch.device | str) -> FlowPipeline:
        """The same pipeline with its flow on another device."""
        return type(self)(self.flow.to(device))

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        batch_size: int = 1,
        guidance_scale: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        **options: Any,
    ) -> FlowPipelineOutput:
        """Draw images.

        Args:
            class_labels: an id or a name for each image; None draws without labels.
            batch_size: how many images to draw without labels, or with a single one.
            guidance_scale: w of c + w·(c − u); 0 is off.
            generator: gives the seeds: one generator for all images, or one for each. None draws them from
                PyTorch's global generator.
            output_type: `pil`, `np` or `pt`: what the images are, see :class:`FlowPipelineOutput`.
            **options: of :class:`flowback.Sampler`.

        Raises:
            InputError: labels, generators or options that do not fit the model or each other.
        """
        require_one_of(output_type, OutputType, "output_type")
        labels: Any = [class_labels] * batch_size if isinstance(class_labels, (int, str)) else class_labels
        count = batch_size if labels is None else len(labels)
        require(count >= 1, "There is nothing to draw; give class_labels, or a batch_size of at least 1.")
        seeds = _seeds(generator, count)
        drawn = self.flow.sample(labels, seeds, guidance=guidance_scale, **options)
        pixels = to_bytes(self.codec.decode(drawn).cpu())
        if output_type == "pt":
            return FlowPipelineOutput(pixels / 255)
        arrays = pixels.permute(0, 2, 3, 1).numpy()  # (b, h, w, c)
        if output_type == "np":
            return FlowPipelineOutput(arrays / np.float32(255))
        grey = arrays.shape[3] == 1
        return FlowPipelineOutput([Image.fromarray(array[:, :, 0] if grey else array) for array in arrays])


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """A seed for each image."""
    if isinstance(generator, torch.Generator) or generator is None:
        device = generator.device if generator is not None else "cpu"
        drawn = torch.randint(2**32, (count,), generator=generator, device=device)
        return [int(seed) for seed in drawn]
    require(len(generator) == count, f"{len(generator)} generators for {count} images; give one for each.")
    return [_seeds(each, 1)[0] for each in generator]
