"""What the flow's hidden layers know: linear probe, nearest neighbours and alignment, at every location.

One pass over the images gives the features of all locations: hidden states averaged over the tokens
(arXiv 2511.22345, Fig. 4). The images carry the training noise, as in training, and no label is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from flowback.alignment.encoders import Encoder, create_encoder
from flowback.checked import replaced
from flowback.data.image_set import AnyImages, ImageSet, evenly
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError
from flowback.evaluation.held_out import LoopOptions, accuracy, held_out_batches, matched, run_images
from flowback.flow import Location
from flowback.model import Flow
from flowback.progress import track
from flowback.task_config import ProbeConfig

__all__ = [
    "PENALTIES",
    "LocationProbe",
    "Probe",
    "all_locations",
    "cknna",
    "encoder_features",
    "features",
    "linear_probe",
    "probe",
    "probe_features",
]

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse strengths C of the L2 penalty that the validation images choose from."""


VALIDATION = 0.2
"""Share of the training images that choose the penalty."""


NEIGHBOURS = 20
"""Of the nearest-neighbour classifier, by cosine."""


ALIGNED = 2000
"""Test images behind CKNNA, at most: it holds the inner products of all pairs."""


@dataclass(frozen=True)
class LocationProbe:
    """How much of the classes the features at one location tell, on test images."""

    location: Location
    linear: float
    """Accuracy of logistic regression."""
    penalty: float
    """The C that the validation images chose."""
    knn: float
    """Accuracy of the nearest neighbours' vote."""
    cknna: float | None
    """Alignment of neighbourhoods with the encoder's; None without one."""


@dataclass(frozen=True)
class Probe:
    """What every location of a flow tells of the classes."""

    locations: tuple[LocationProbe, ...]
    top1_gradient: float | None
    """Accuracy of training-free classification of the same test images; None for an unconditional model."""
    train_images: int
    test_images: int

    @property
    def best(self) -> LocationProbe:
        """The location with the most accurate linear probe."""
        return max(self.locations, key=lambda row: row.linear)


def all_locations(flow: Flow) -> list[Location]:
    """Every (block, layer), counted from 1."""
    return flow.config.locations


@torch.no_grad()
def features(
    flow: Flow, images: ImageSet, locations: Sequence[Location], **loop: Unpack[LoopOptions]
) -> dict[Location, Float[Tensor, "n w"]]:
    """Features of all locations, averaged over tokens, from one encode pass over the images.

    Args:
        flow: the model.
        images: the set.
        locations: (block, layer) pairs.
        **loop: which images, in which batches, with which noise: see :class:`LoopOptions`.

    Raises:
        InputError: a location outside the model.
    """
    known = set(all_locations(flow))
    for location in locations:
        if location not in known:
            raise InputError(f"Location {location} is outside the model; {flow.config.locations_in_words}.")
    parts: dict[Location, list[Tensor]] = {location: [] for location in locations}
    for batch in held_out_batches(flow, images, "features", **loop):
        out = flow(batch.noised(flow.config), hidden=locations, noise=batch.levels)
        for location, hidden in out.hidden.items():
            parts[location].append(hidden.mean(dim=1).float().cpu())
    return {location: torch.cat(rows) for location, rows in parts.items()}


def encoder_features(
    encoder: Encoder, images: ImageSet, limit: int | None = None, batch_size: int = 64
) -> Float[Tensor, "n d"]:
    """Pooled features of the clean images."""
    parts = evenly(len(images), limit).split(batch_size)
    device = encoder.mean.device
    return torch.cat([encoder.pooled(to_unit_range(images.read(index).to(device))).cpu() for index in parts])


def linear_probe(
    train: Float[np.ndarray, "n w"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m w"],
    test_labels: Int[np.ndarray, " m"],
    seed: int = 0,
) -> tuple[float, float]:
    """Test accuracy of logistic regression, and the C that a held-out fifth of the training images chose.

    Features arrive standardised. After the choice, the regression is fitted to all training images.
    """
    order = np.random.default_rng(seed).permutation(len(train))
    held, kept = np.split(order, [int(VALIDATION * len(order))])
    scores = [
        _fit(penalty, train[kept], train_labels[kept]).score(train[held], train_labels[held])
        for penalty in PENALTIES
    ]
    best = PENALTIES[int(np.argmax(scores))]
    return float(_fit(best, train, train_labels).score(test, test_labels)), best


def _fit(penalty: float, rows: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the best C is what counts, not the last digit
        return LogisticRegression(C=penalty, max_iter=300).fit(rows, labels)


def cknna(features: Float[Tensor, "n d"], others: Float[Tensor, "n c"], neighbours: int = 10) -> float:
    """Centred kernel alignment over mutual nearest neighbours (Huh et al., arXiv 2405.07987, App. A).

    With K, L the inner products of the normalised rows of each side, centred along rows, and α(i, j) = 1
    where j is among i's nearest neighbours on both sides:
    Σ α·K·L, divided by the root of the product of the same with (K, K) and with (L, L).

    Args:
        features: of n images.
        others: of the same images.
        neighbours: nearest ones that count.

    Raises:
        InputError: no more images than neighbours.
    """
    if len(features) <= neighbours:
        raise InputError(f"CKNNA with {neighbours} neighbours needs more images than {len(features)}.")
    kernels, near = [], []
    for rows in (features, others):
        rows = torch.nn.functional.normalize(rows.double(), dim=1)
        kernel = rows @ rows.T
        hidden = kernel.clone().fill_diagonal_(-torch.inf)
        nearest = hidden.topk(neighbours, dim=1).indices
        near.append(torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, value=True))
        kernels.append(kernel - kernel.mean(dim=1, keepdim=True))
    both = (kernels[0] * kernels[1])[near[0] & near[1]].sum()
    norms = [kernel[among].square().sum() for kernel, among in zip(kernels, near, strict=True)]
    return float(both / (norms[0] * norms[1]).sqrt())


def probe(
    flow: Flow,
    train: AnyImages | None = None,
    test: AnyImages | None = None,
    *,
    config: ProbeConfig | None = None,
    progress: bool = False,
    **options: Any,
) -> Probe:
    """What the hidden layers know: linear probe, nearest neighbours and CKNNA at every location.

    Args:
        flow: the model.
        train: labelled images that the classifiers are fitted to; None: those of the flow's run.
        test: labelled images that they are tested on; None: those of the flow's run.
        config: locations, number of images, encoder, seed.
        progress: show bars.
        **options: fields of :class:`flowback.ProbeConfig` that replace those of ``config``.

    Raises:
        InputError: images without labels, a location outside the model, or an unknown option.

    Example:
        >>> import flowback
        >>> from flowback.data.load import load_images
        >>> flow = flowback.create_flow("digits-mini", num_classes=10)
        >>> train, test = (load_images(flowback.DataConfig(), 8, 1, split) for split in ("train", "test"))
        >>> found = flowback.probe(flow, train, test, train_limit=40, test_limit=20, encoder=None)
        >>> len(found.locations) == len(flow.config.locations)
        True
    """
    (config,) = replaced((config or ProbeConfig(),), options)
    train = matched(flow, run_images(flow, "train") if train is None else train)
    test = matched(flow, run_images(flow, "test") if test is None else test)
    locations = config.locations or all_locations(flow)
    labels, tables = [], []
    for images, limit in ((train, config.train_limit), (test, config.test_limit)):
        labels.append(_labels(images, limit))
        loop: LoopOptions = {
            "limit": limit,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "progress": progress,
        }
        tables.append(features(flow, images, locations, **loop))
    aligned = None
    if config.encoder is not None:
        encoder = create_encoder(config.encoder, config.encoder_weights).to(flow.device)
        aligned = encoder_features(encoder, test.in_pixels, config.test_limit, config.batch_size)
    probes = probe_features(tables[0], labels[0], tables[1], labels[1], aligned, config.seed, progress)
    free = accuracy(flow, test, **loop).top1 if flow.config.num_classes else None
    return Probe(tuple(probes), free, len(labels[0]), len(labels[1]))


def _labels(images: ImageSet, limit: int | None) -> Int64[Tensor, " n"]:
    if images.labels is None:
        raise InputError(f"{images.name} has no labels; a probe needs images sorted into class folders.")
    return images.labels[evenly(len(images), limit)]


def probe_features(
    train: dict[Location, Float[Tensor, "n w"]],
    train_labels: Int[Tensor, " n"],
    test: dict[Location, Float[Tensor, "m w"]],
    test_labels: Int[Tensor, " m"],
    encoder: Float[Tensor, "m d"] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[LocationProbe]:
    """Probe every location, given its features.

    Args:
        train: features of training images, from :func:`features`.
        train_labels: their classes.
        test: features of test images.
        test_labels: their classes.
        encoder: an encoder's features of the test images, for CKNNA.
        seed: of the split that chooses the penalty.
        progress: show a bar.
    """
    labels, truth = train_labels.numpy(), test_labels.numpy()
    among = evenly(len(test_labels), ALIGNED)
    probes = []
    for location in track(train, len(train), "probe", "locations") if progress else train:
        scaler = StandardScaler().fit(train[location].numpy())
        rows, others = (scaler.transform(side[location].numpy()) for side in (train, test))
        linear, penalty = linear_probe(rows, labels, others, truth, seed)
        voters = KNeighborsClassifier(min(NEIGHBOURS, len(rows)), metric="cosine").fit(rows, labels)
        alignment = None if encoder is None else cknna(test[location][among], encoder[among])
        probes.append(LocationProbe(location, linear, penalty, float(voters.score(others, truth)), alignment))
    return probes
