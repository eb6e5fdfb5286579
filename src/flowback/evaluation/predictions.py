"""What a flow says of each image: its class, how sure, and how likely the image is."""

from __future__ import annotations

import csv
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from flowback.classification import Method, classify
from flowback.config import DataConfig
from flowback.data.image_set import AnyImages, ImageSet, MemoryImages, as_image_set
from flowback.data.load import load_images
from flowback.data.pixels import UnreadableImageError, decode
from flowback.errors import InputError
from flowback.evaluation.held_out import LoopOptions, default_methods, held_out_batches, log_densities
from flowback.files import replacing, write_json
from flowback.flow.likelihood import bits_per_dim
from flowback.model import Flow
from flowback.provenance import environment

__all__ = ["Prediction", "Predictions", "open_pictures", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What a flow says of one image."""

    image: str
    """Its file, in the folder."""
    label: str | None
    """Name of its class, or id if the model knows no names; None for an unconditional model."""
    score: float | None
    """Softmax of the rule's scores at that class. With the exhaustive rule this is the class's probability
    given the image, if all classes are equally likely; other rules give a number that only ranks."""
    log_prob: float
    """Nats, of the image with the training noise, given that class."""
    bits_per_dim: float
    """Of its 8-bit values given that class, an upper bound by uniform dequantisation."""


@dataclass(frozen=True)
class Predictions:
    """Of several images, or of one process's share of them."""

    rows: list[Prediction]

    def merge(self, other: Predictions) -> Predictions:
        """This share and the one that follows."""
        return Predictions(self.rows + other.rows)

    def save(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write predictions.csv, a line an image, and predictions.json, with ``settings`` and environment."""
        with replacing(folder / "predictions.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(Prediction))
            writer.writerows(astuple(row) for row in self.rows)
        content = {"settings": settings, "environment": environment()}
        write_json(folder / "predictions.json", content | {"predictions": [asdict(row) for row in self.rows]})


def open_pictures(flow: Flow, path: Path, bad_images: Literal["refuse", "skip"] = "refuse") -> ImageSet:
    """A picture or a folder of pictures, brought to the size of a flow of pixels; all sub-folders are read.

    Raises:
        InputError: nothing there, unreadable pictures, or a flow of latents.
    """
    if flow.run is not None and flow.run.codec.vae is not None:
        raise InputError(
            f"This flow models latents of {flow.run.codec.vae}; prepare the pictures with `flowback prepare "
            "--vae`, and give that set as --data instead of --images."
        )
    size, channels = flow.config.image_size, flow.config.channels
    if path.is_file():
        try:
            pixels = torch.tensor(decode(path, size, channels))[None]
        except UnreadableImageError as error:
            raise InputError(f"{path} cannot be read ({error}); give a picture.") from None
        return MemoryImages(path.name, (), None, pixels, (path.name,))
    if not path.is_dir():
        raise InputError(f"--images {path} is neither a picture nor a folder of pictures; give one of them.")
    return load_images(
        DataConfig("folder", path, holdout=0.0, bad_images=bad_images), size, channels, "train"
    )


@torch.no_grad()
def predict(
    flow: Flow, images: AnyImages, method: Method | None = None, draws: int = 1, **loop: Unpack[LoopOptions]
) -> list[Prediction]:
    """Classify images without labels, and score them.

    Args:
        flow: the model, of pixels.
        images: of the model's size; labels are not looked at.
        method: the rule; None is the exhaustive one up to 20 classes, else the normalised one.
        draws: draws of the noise to classify by.
        **loop: which images, in which batches, with which noise: see ``LoopOptions``.

    Example:
        >>> import flowback
        >>> from flowback.data.load import load_images
        >>> flow = flowback.create_flow("digits-mini", num_classes=10)
        >>> test = load_images(flowback.DataConfig("digits"), image_size=8, channels=1, split="test")
        >>> found = predict(flow, test, limit=3)
        >>> len(found), found[0].label in set("0123456789")
        (3, True)
    """
    method = method or ("exhaustive" if "exhaustive" in default_methods(flow) else "normalised")
    images, seed = as_image_set(images), loop.get("seed", 0)
    found = []
    for batch in held_out_batches(flow, images, "images", **loop):
        labels = scores = None
        if flow.config.num_classes:
            logits = classify(flow, batch.images, method, batch.level, draws=draws, seeds=batch.seeds)
            scores, labels = logits.double().softmax(dim=1).max(dim=1)
        batch = batch._replace(labels=labels)
        log_probs, dequantised = (log_densities(flow, batch, kind)[0] for kind in (False, True))
        bits = bits_per_dim(dequantised, flow.config.dims)
        for row, number in enumerate(batch.seeds):
            label = None if labels is None else int(labels[row])
            found.append(
                Prediction(
                    images.file_name(number - seed),
                    None if label is None else flow.classes[label] if flow.classes else str(label),
                    None if scores is None else float(scores[row]),
                    float(log_probs[row]),
                    float(bits[row]),
                )
            )
    return found
