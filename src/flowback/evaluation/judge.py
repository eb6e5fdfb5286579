"""Judge sets of samples against one reference, whose statistics are made once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import UInt8
from torch import Tensor

from flowback.alignment.encoders import Encoder
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError
from flowback.evaluation.inception import Inception
from flowback.evaluation.metrics import Moments, frechet_distance, pooled_moments
from flowback.evaluation.protocol import (
    COMPARABLE,
    InceptionStatistics,
    Protocol,
    adm_figures,
    announced,
    kept,
    reference_statistics,
)
from flowback.evaluation.references import Reference

__all__ = ["Judge", "SampleStatistics"]


@dataclass(frozen=True)
class SampleStatistics:
    """What a judge gathers of samples, or of one process's part of them."""

    encoded: Moments
    """In the encoder's pooled features."""
    inception: InceptionStatistics | None

    def merge(self, other: SampleStatistics) -> SampleStatistics:
        """This part and the one that follows."""
        inception = None
        if self.inception is not None and other.inception is not None:
            inception = self.inception.merge(other.inception)
        return SampleStatistics(self.encoded.merge(other.encoded), inception)


class Judge:
    """Figures of samples against a reference: those of the protocol, and a distance that needs no download.

    Args:
        reference: what the samples are compared with.
        encoder: for ``fd_efficientnet_lite0``; skipped where the reference has statistics only.
        protocol: of the Inception figures.
        inception: the network, unless the protocol is ``none``.
        batch_size: images in one pass.
        progress: show a bar while the reference's statistics are made.

    Raises:
        InputError: a protocol that the reference cannot serve.
    """

    def __init__(
        self,
        reference: Reference,
        encoder: Encoder,
        protocol: Protocol = "none",
        inception: Inception | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> None:
        self.reference, self.encoder, self.protocol, self.inception = reference, encoder, protocol, inception
        images = reference.images
        if images is None and protocol == "none":
            raise InputError(
                f"{reference.name} holds statistics of Inception features and no images; give --protocol adm."
            )
        self.encoded: Moments | None = None
        if images is not None:
            key = (images.fingerprint, encoder.fingerprint, "pooled")
            arrays = kept(
                key,
                lambda: pooled_moments(
                    encoder, announced(images, encoder.name, batch_size, progress)
                ).arrays(),
            )
            self.encoded = Moments.from_arrays(arrays)
        self.statistics: InceptionStatistics | None = None
        if inception is not None and protocol != "none":
            self.statistics = reference_statistics(reference, inception, protocol, batch_size, progress)

    def gather(
        self, samples: Iterable[UInt8[Tensor, "_ c h w"]], total: int, start: int = 0
    ) -> SampleStatistics:
        """Statistics of samples that come in batches: those from ``start`` on, of ``total`` in all."""
        inception_statistics = None
        if self.statistics is not None and self.inception is not None:
            adm = self.protocol == "adm"
            inception_statistics = InceptionStatistics(self.inception, total, adm, total if adm else 0, start)
        statistics = SampleStatistics(Moments(self.encoder.dim), inception_statistics)
        for batch in samples:
            statistics.encoded.add(
                self.encoder.pooled(to_unit_range(batch.to(self.encoder.mean.device))).cpu()
            )
            if inception_statistics is not None:
                inception_statistics.add(batch)
        return statistics

    def figures(self, samples: SampleStatistics) -> dict[str, float]:
        """Judge all samples."""
        figures = {}
        if self.encoded is not None:
            figures["fd_efficientnet_lite0"] = frechet_distance(samples.encoded, self.encoded)
        if samples.inception is not None and self.statistics is not None:
            if self.protocol == "adm":
                figures |= adm_figures(samples.inception, self.statistics)
            else:
                pool = samples.inception.pool
                figures["fid_tarflow"] = frechet_distance(pool, self.statistics.pool)
        return figures

    def warnings(self, total: int) -> list[str]:
        """What belongs beside the figures of ``total`` samples."""
        sentences = self._about_encoded(total)
        if self.inception is None or self.protocol == "none":
            return sentences
        if not self.inception.published:
            sentences.append(
                "The Inception weights are not those of the published file (by its SHA-256): FID and all "
                "else from them compare with no published figure."
            )
        if total < COMPARABLE:
            sentences.append(
                f"FID from {total:,} samples: it is larger than from {COMPARABLE:,}, "
                f"and comparable only with figures from {total:,} samples."
            )
        if total <= 2048:
            sentences.append(
                f"{total:,} samples do not fill a covariance of 2048 features; FID and sFID are crude."
            )
        return sentences

    def _about_encoded(self, total: int) -> list[str]:
        """The same of the distance in the encoder's features."""
        name, width = "fd_efficientnet_lite0", self.encoder.dim
        if self.encoded is None:
            return []
        sentences = []
        if total < COMPARABLE:
            sentences.append(
                f"{name} from {total:,} samples: it is larger than from more, and comparable only with "
                f"figures from {total:,} samples against the same reference."
            )
        fewest = min(total, int(self.encoded.count))
        if fewest <= width:
            what = "samples" if fewest == total else "images of the reference"
            sentences.append(
                f"{fewest:,} {what} do not fill a covariance of {width} features; {name} is crude."
            )
        return sentences
