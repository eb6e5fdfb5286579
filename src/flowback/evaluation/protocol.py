"""FID and its companions under two published protocols. Every figure of them is recorded with its protocol.

**adm** (Dhariwal and Nichol, arXiv 2105.05233): FID, sFID, Inception Score in 10 splits in file order,
precision and recall with k = 3, of samples rounded to 8 bits, against a fixed reference.

**tarflow** (arXiv 2412.06329): FID alone, values cut down to 8 bits and not rounded, against the training
images with half of them mirrored. Only for comparing with the papers that use it.

Statistics of references are kept on disk: a pass over ImageNet is made once.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load, save
from torch import Tensor

from flowback.data.image_set import ImageSet
from flowback.data.pixels import Faults, quantise, to_unit_range
from flowback.errors import InputError
from flowback.evaluation.inception import Inception
from flowback.evaluation.metrics import InceptionScore, Moments, frechet_distance, precision_recall
from flowback.evaluation.references import Reference
from flowback.files import cache_folder, no_cache, replacing
from flowback.progress import track
from flowback.reading import open_regular

__all__ = [
    "COMPARABLE",
    "InceptionStatistics",
    "Protocol",
    "adm_figures",
    "announced",
    "batches",
    "kept",
    "reference_statistics",
    "tarflow_reference",
]

log = logging.getLogger("flowback")

_DIGEST = 32
"""Bytes of the hash that a file of kept arrays begins with."""
_LAYOUT = 2
"""Goes into the key; raise it when what is kept changes."""


def kept(key: Sequence[str], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The arrays that were kept under ``key``, or those of ``make``, which are kept from now on.

    Damaged ones are computed anew; without a cache that can be written, nothing is kept.

    Args:
        key: all that the arrays depend on: hashes of images and weights, and the rule.
        make: computes the arrays.
    """
    name = hashlib.blake2b("\0".join((str(_LAYOUT), *key)).encode(), digest_size=16).hexdigest()
    path = None
    try:
        path = cache_folder() / "statistics" / f"{name}.tensors"
        with open_regular(path) as file:
            digest, arrays = file.read(_DIGEST), file.read()
        if hashlib.blake2b(arrays, digest_size=_DIGEST).digest() == digest:
            return load(arrays)
    except FileNotFoundError:
        pass
    except OSError as error:
        no_cache(error)
    computed = make()
    arrays = save({array: tensor.contiguous() for array, tensor in computed.items()})
    try:
        if path is not None:
            with replacing(path, "wb") as file:
                file.write(hashlib.blake2b(arrays, digest_size=_DIGEST).digest() + arrays)
    except OSError as error:
        no_cache(error)
    return computed


Protocol = Literal["none", "adm", "tarflow"]


COMPARABLE = 50_000
"""Samples behind the FIDs of papers; one from fewer is larger, and says so."""


REFERENCES = 10_000
"""References of precision and recall, at most, as in ADM's files."""


class InceptionStatistics:
    """What the protocols need of one set of images, gathered batch by batch.

    Args:
        inception: the network.
        total: images of the whole set.
        scores: also gather the Inception Score.
        rows: keep the pool_3 features of so many of the images, for precision and recall.
        start: place in the set of the first image that comes here; other parts are merged.
    """

    def __init__(
        self, inception: Inception, total: int, scores: bool = False, rows: int = 0, start: int = 0
    ) -> None:
        self.inception = inception
        self.pool, self.spatial = Moments(inception.pool_dim), Moments(inception.spatial_dim)
        self.score = InceptionScore(total, start=start) if scores else None
        self._stride, self._next = max(1, -(-total // rows)) if rows else 0, start
        self._rows: list[Tensor] = []

    def arrays(self) -> dict[str, Tensor]:
        """All but the score, for keeping."""
        parts = {"pool": self.pool.arrays(), "spatial": self.spatial.arrays()}
        flat = {
            f"{part}.{name}": array
            for part, statistics in parts.items()
            for name, array in statistics.items()
        }
        return {**flat, "rows": self.rows}

    def restore(self, arrays: dict[str, Tensor]) -> None:
        """Take back what :meth:`arrays` gave."""
        pool, spatial = (
            Moments.from_arrays({name: arrays[f"{part}.{name}"] for name in ("count", "mean", "scatter")})
            for part in ("pool", "spatial")
        )
        self.pool, self.spatial, self._rows = pool, spatial, [arrays["rows"]]

    def add(self, images: UInt8[Tensor, "b c h w"]) -> None:
        """Take in the next images."""
        features = self.inception(images)
        if self._stride:
            offset = -self._next % self._stride
            self._rows.append(features.pool[offset :: self._stride].cpu())
            self._next += len(images)
        self.pool.add(features.pool)
        self.spatial.add(features.spatial)
        if self.score is not None:
            self.score.add(features.logits)

    def merge(self, other: InceptionStatistics) -> InceptionStatistics:
        """This part of the set and the one that follows."""
        merged = copy.copy(self)
        merged.pool, merged.spatial = self.pool.merge(other.pool), self.spatial.merge(other.spatial)
        merged._rows = [*self._rows, *other._rows]
        if self.score is not None and other.score is not None:
            merged.score = self.score.merge(other.score)
        return merged

    def __getstate__(self) -> dict[str, object]:
        """For sending to another process, which has the network itself."""
        return {**self.__dict__, "inception": None}

    @property
    def rows(self) -> Float[Tensor, "n p"]:
        """The pool_3 features that were kept."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, len(self.pool.mean))


def batches(images: ImageSet, size: int = 64) -> Iterator[UInt8[Tensor, "_ c h w"]]:
    """All images of a set, in order."""
    for indices in torch.arange(len(images)).split(size):
        yield images.read(indices)


def announced(
    images: ImageSet, network: str, size: int, progress: bool = True
) -> Iterator[UInt8[Tensor, "_ c h w"]]:
    """All images of a reference, in order; it is said that its statistics are made, and how far that is."""
    log.info(
        "Statistics of the reference, %s images of %s, in %s: made once, then kept. "
        "--reference-limit N takes fewer.",
        *(f"{len(images):,}", images.name, network),
    )
    parts = batches(images, size)
    yield from track(parts, len(images), f"Reference in {network}", step=size) if progress else parts


def reference_statistics(
    reference: Reference,
    inception: Inception,
    protocol: Protocol,
    size: int = 64,
    progress: bool = False,
) -> InceptionStatistics:
    """Statistics of a reference under a protocol: its own where it carries them, otherwise of its images.

    Those of images are kept on disk.

    Raises:
        InputError: TARFlow's protocol, and a reference without images.
    """
    images, adm = reference.images, protocol == "adm"
    if images is None and not adm:
        raise InputError(
            f"--protocol tarflow computes its statistics from images, and {reference.name} has none; "
            "give a data set or a folder."
        )
    total = len(images) if images is not None else 0
    statistics = InceptionStatistics(inception, max(1, total), rows=REFERENCES if adm else 0)

    def compute() -> dict[str, Tensor]:
        if images is not None:
            parts = announced(images, "Inception", size, progress)
            for batch in parts if adm else tarflow_reference(parts):
                statistics.add(batch)
        return statistics.arrays()

    if images is not None:
        statistics.restore(kept((images.fingerprint, inception.fingerprint, protocol), compute))
    if adm:
        statistics.pool, statistics.spatial = (
            reference.pool or statistics.pool,
            reference.spatial or statistics.spatial,
        )
    return statistics


def adm_figures(samples: InceptionStatistics, reference: InceptionStatistics) -> dict[str, float]:
    """The figures of ADM's evaluator; those that the reference cannot give are left out."""
    figures = {}
    if reference.pool.count:
        figures["fid"] = frechet_distance(samples.pool, reference.pool)
    if reference.spatial.count:
        figures["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    if samples.score is not None:
        figures["inception_score"], figures["inception_score_std"] = samples.score.result()
    if len(samples.rows) and len(reference.rows):
        result = precision_recall(samples.rows, reference.rows)
        figures["precision"], figures["recall"] = result.precision, result.recall
    return figures


def tarflow_reference(
    images: Iterable[UInt8[Tensor, "_ c h w"]], seed: int = 0
) -> Iterator[UInt8[Tensor, "_ c h w"]]:
    """The training images as TARFlow's statistics see them: half mirrored, and cut down to 8 bits again."""
    generator = torch.Generator().manual_seed(seed)
    for batch in images:
        mirror = torch.rand(len(batch), generator=generator) < 0.5
        flipped = torch.where(mirror[:, None, None, None], batch.flip(-1), batch)
        yield quantise(to_unit_range(flipped), [""] * len(batch), Faults(), "truncate")
