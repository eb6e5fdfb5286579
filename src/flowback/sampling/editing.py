"""Editing images through z: interpolation between two of them, and redrawing a part of one.

Both encode images, change z, and decode it. Images are those that the flow models, with the training noise
added (:meth:`flowback.Flow.add_noise`), and so are the results, unless they are denoised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowback.errors import InputError
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.tarflow import UserLabels
from flowback.sampling.decoder import Kept, sequential
from flowback.sampling.guidance import Guidance
from flowback.sampling.sampler import Sampler
from flowback.sampling.sampler import noise as fresh_noise

__all__ = ["Inpainted", "inpaint", "interpolate", "slerp"]


@torch.inference_mode(False)
@torch.no_grad()
def interpolate(
    flow: TARFlow,
    first: Float[Tensor, "b c h w"],
    second: Float[Tensor, "other c h w"],
    steps: int = 9,
    labels: UserLabels = None,
    second_labels: UserLabels = None,
    denoise: bool = False,
    *,
    noise: float | None = None,
) -> Float[Tensor, "b s c h w"]:
    """Images on the way from ``first`` to ``second``, equally spaced on the great circle between their z.

    Without ``denoise``, the two ends are the given images, up to the rounding of the inverse. Between images
    of two classes the label moves too: its class weights go from one to the other in equal steps.

    Args:
        flow: the model.
        first: on [-1, 1], with the training noise added.
        second: as many.
        steps: images on each way, with both ends.
        labels: of ``first``; None is unconditional.
        second_labels: of ``second``; None: the same labels.
        denoise: denoise them at the end, as :class:`flowback.Sampler` does.
        noise: level of the noise on the images, for a flow with a range of levels.

    Raises:
        InputError: images that do not fit the model or each other, fewer than two steps, or bad labels.
    """
    if steps < 2:
        raise InputError(f"An interpolation of {steps} steps; it takes at least 2, its ends.")
    flow.check_images(first)
    flow.check_images(second)
    if first.shape != second.shape:
        raise InputError(
            f"The first images are {tuple(first.shape)}, the second {tuple(second.shape)}; give as many."
        )
    if labels is None and second_labels is not None:
        raise InputError("Only the second images have labels; give the first ones theirs too.")
    start, end = flow.labels(labels, len(first)), flow.labels(second_labels, len(first))
    ways = torch.linspace(0, 1, steps, dtype=flow.data_dtype, device=flow.device)
    if start is not None and end is not None:
        along = torch.stack([torch.lerp(_weights(flow, start), _weights(flow, end), w) for w in ways], 1)
        all_labels: Labels = along.flatten(0, 1)
    else:
        end = start
        all_labels = None if start is None else start.repeat_interleave(steps, 0)
    from_z, to_z = (
        flow(images.to(flow.device, flow.data_dtype), label, noise=noise).z
        for images, label in ((first, start), (second, end))
    )
    z = torch.stack([slerp(from_z, to_z, way) for way in ways], 1).flatten(0, 1)
    sampler = Sampler(flow, denoise=denoise, noise=noise)
    parts = []
    for part in _parts(len(z), sampler):
        part_labels = None if all_labels is None else all_labels[part]
        *_, tokens = sampler.invert(z[part], part_labels, torch.zeros(len(z[part])))
        parts.append(_denoised(sampler, flow.images(tokens), part_labels, range(len(z))[part]))
    return torch.cat(parts).unflatten(0, (len(first), steps))


def slerp(
    first: Float[Tensor, "b n d"], second: Float[Tensor, "b n d"], way: Float[Tensor, ""]
) -> Float[Tensor, "b n d"]:
    """sin((1 - w)·ω)/sin ω · first + sin(w·ω)/sin ω · second, with ω the angle between them.

    Points on the way are as long as draws of the prior; those of a straight line are shorter. Vectors in the
    same or in opposite directions have no great circle, and get the straight line.
    """
    a, b = first.flatten(1), second.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b).clamp(-1, 1)[:, None, None]
    angle = cosine.acos()
    flat = angle.sin() < 1e-6
    safe = torch.where(flat, torch.ones_like(angle), angle)
    near = torch.where(flat, 1 - way, torch.sin((1 - way) * safe) / safe.sin())
    far = torch.where(flat, way, torch.sin(way * safe) / safe.sin())
    return near * first + far * second


@dataclass(frozen=True)
class Inpainted:
    """Images of which a part was redrawn."""

    images: Float[Tensor, "b c h w"]
    """The kept tokens as they were given, bit for bit; the others redrawn."""
    log_prob: Float[Tensor, " b"]
    """log p(x | label) of the images before denoising, in nats: higher, the better both parts fit."""
    drift: Float[Tensor, " b"]
    """How far the kept tokens would have moved, had they not been held: root mean square on [-1, 1]."""
    exact: Bool[Tensor, " b"]
    """Whether the redrawn part is a draw from p(redrawn | kept); otherwise it approximates one."""


@torch.inference_mode(False)
@torch.no_grad()
def inpaint(
    flow: TARFlow,
    images: Float[Tensor, "b c h w"],
    keep: Bool[Tensor, "m n"],
    labels: UserLabels = None,
    seeds: Sequence[int] | None = None,
    rounds: int = 4,
    guidance: Guidance | float = 0.0,
    denoise: bool = False,
    *,
    noise: float | None = None,
) -> Inpainted:
    """Keep some tokens of each image, and redraw the others.

    A round encodes the image, replaces z of the redrawn tokens by fresh noise, and decodes. A kept token
    depends on its z, and on the tokens before it in each block's order, which may be redrawn ones: its z
    alone does not hold it. Block 1 therefore decodes with the kept tokens set to their given values, so that
    the tokens after them follow what is kept. z of the kept tokens still knows what stood in the redrawn
    part; more rounds forget it.

    Only where nothing redrawn comes before anything kept, in every block's order, is the result a draw from
    p(redrawn | kept). Orders alternate, so that takes a flow of one block with the kept tokens first in
    raster order (or nothing kept); p is that of the guided flow where there is guidance. ``exact`` and
    ``drift`` of the result say how it is.

    Args:
        flow: the model.
        images: on [-1, 1], with the training noise added.
        keep: True for each token that stays, in raster order (:meth:`flowback.Flow.tokens`); one row for all
            images, or one an image.
        labels: class ids, names or weights; None is unconditional.
        seeds: of the fresh noise, one an image; None is 0, 1, 2, ...
        rounds: how often the other tokens are drawn again.
        guidance: of decoding, as in :func:`flowback.sample`; encoding has none.
        denoise: denoise the redrawn tokens at the end, and leave the kept ones as they are.
        noise: level of the noise on the images, for a flow with a range of levels.

    Raises:
        InputError: images, masks, labels or seeds that do not fit the model or each other, or no rounds.
    """
    flow.check_images(images)
    tokens = flow.tokens(images.to(flow.device, flow.data_dtype))
    seeds = list(range(len(images)) if seeds is None else seeds)
    _check(flow, len(images), keep, seeds, rounds)
    checked = flow.labels(labels, len(images))
    flow.levels(noise, len(images))
    sampler = Sampler(flow, guidance, denoise, noise=noise)
    sampler.check(checked is not None)
    scales = sampler.guidance.scales(len(images), flow.blocks[0].proj_in.weight)
    keep = keep.to(flow.device).expand(len(images), -1)
    parts = []
    for part in _parts(len(images), sampler):
        part_labels = None if checked is None else checked[part]
        kept = Kept(tokens[part], keep[part])
        drawn, drift = _redraw(sampler, kept, part_labels, scales[part], seeds[part], rounds)
        drawn_images = flow.images(drawn)
        log_prob = flow(drawn_images, part_labels, noise=noise).log_prob
        if denoise:
            clean = flow.tokens(_denoised(sampler, drawn_images, part_labels, seeds[part]))
            drawn_images = flow.images(torch.where(kept.places[..., None], kept.tokens, clean))
        parts.append((drawn_images, log_prob, drift))
    drawn_images, log_prob, drift = (torch.cat(values) for values in zip(*parts, strict=True))
    first = (keep[:, :-1] >= keep[:, 1:]).all(1)  # no redrawn token before a kept one
    exact = (first & (flow.config.blocks == 1)) | keep.all(1) | ~keep.any(1)
    return Inpainted(drawn_images, log_prob, drift, exact)


def _check(flow: TARFlow, count: int, keep: Bool[Tensor, "m n"], seeds: Sequence[int], rounds: int) -> None:
    """Refuse what does not fit so many images, before work starts."""
    if keep.shape[1] != flow.config.tokens:
        raise InputError(
            f"The mask is of {keep.shape[1]} tokens; the flow's images have {flow.config.tokens}."
        )
    if keep.shape[0] not in (1, count):
        raise InputError(f"{keep.shape[0]} masks for {count} images; give one, or one per image.")
    if rounds < 1:
        raise InputError(f"{rounds} rounds of redrawing; it takes at least 1.")
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} images; give one seed per image.")


def _redraw(
    sampler: Sampler, kept: Kept, labels: Labels, scales: Tensor, seeds: Sequence[int], rounds: int
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, " b"]]:
    """The tokens after so many rounds, and the drift of the last one."""
    flow, x, held = sampler.flow, kept.tokens, kept.places[..., None]
    inner = x
    for turn in range(rounds):
        encoded = flow(flow.images(x), labels, noise=sampler.noise).z
        z = torch.where(held, encoded, fresh_noise(flow, seeds, redraw=turn))
        *_, inner = (z, *islice(sampler.invert(z, labels, scales), flow.config.blocks - 1))
        x = sequential(sampler.decoder(1, labels, scales), inner, kept)  # block 1 reads in raster order
    free = sequential(sampler.decoder(1, labels, scales), inner)
    moved = torch.where(held, free - kept.tokens, 0).square().sum((1, 2))
    values = (kept.places.sum(1) * kept.tokens.shape[2]).clamp_min(1)
    return x, (moved / values).sqrt()


def _denoised(
    sampler: Sampler, images: Float[Tensor, "b c h w"], labels: Labels, seeds: Sequence[int]
) -> Float[Tensor, "b c h w"]:
    """The images at the end of the sampler's denoising."""
    *_, clean = (images, *sampler.denoised(images, labels, seeds))
    return clean


def _parts(count: int, sampler: Sampler) -> Iterator[slice]:
    """Batches of as many images as are best decoded together."""
    for start in range(0, count, sampler.images_at_once):
        yield slice(start, start + sampler.images_at_once)


def _weights(flow: TARFlow, labels: Tensor) -> Float[Tensor, "b k"]:
    """Labels as class weights."""
    if labels.is_floating_point():
        return labels
    return torch.nn.functional.one_hot(labels, flow.config.num_classes or 0).to(flow.dtype)
