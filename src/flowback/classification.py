"""Classification with the flow's own likelihood, without training (arXiv 2511.22345, Algorithm 1).

Gradient rule: class logits λ = 0, weights p = softmax(λ), the same p in every block; the predicted class is
the one along which log p(x | p) rises fastest. One forward and one backward pass for any number of classes,
which enters only in the product of the weights with the class tables.
Normalised rule (this project's): the same slopes, each divided by how far its class's embeddings lie from the
unconditional ones. The scale of λ is arbitrary: a class with a long way rises fast at first, and curvature
takes most of that back before the way is gone. The slope for each unit of the way does not reward length.
Exhaustive rule: argmax over k of log p(x | k), one forward pass for every class.

The flow is trained on noised images, so all rules first add noise to each image, from its own seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.checked import require
from flowback.config import ModelConfig
from flowback.errors import InputError
from flowback.flow import TARFlow
from flowback.flow.frozen import constant, frozen
from flowback.flow.likelihood import add_noise

__all__ = ["Method", "classify", "embedding_distances"]

Method = Literal["gradient", "normalised", "exhaustive"]


_ROWS = 256
"""Images in one forward pass of the exhaustive rule, over all classes."""


def classify(
    flow: TARFlow,
    images: Float[Tensor, "b c h w"],
    method: Method = "gradient",
    noise: bool | float | Sequence[float] = True,
    draws: int = 1,
    seeds: Sequence[int] | None = None,
    steps: int = 1,
    step_size: float = 1.0,
) -> Float[Tensor, "b k"]:
    """Scores of every class for every image; the largest is the predicted class.

    ``gradient`` scores are ∂ log p / ∂λ in nats per unit of logit (after several steps: the logits
    themselves); ``normalised`` divides them by :func:`embedding_distances`; ``exhaustive`` scores are
    log p(x | k) in nats. Each image is scored by itself.

    Args:
        flow: a class-conditional flow.
        images: clean images on [-1, 1].
        method: the rule.
        noise: add the model's training noise to the images; False takes them as they are. For a flow with a
            range of levels: the level, by default the geometric middle; several average their scores; False
            takes the lowest as theirs.
        draws: draws of the noise to average the scores over.
        seeds: of the noise, one for each image; None is 0, 1, 2, ...
        steps: steps of gradient ascent on the logits; 1 is Algorithm 1.
        step_size: of each step, in logits per nat.

    Raises:
        InputError: an unconditional flow, an unknown method, or numbers and noise levels out of range.

    Example:
        >>> import torch
        >>> from flowback import Flow, ModelConfig, classify
        >>> flow = Flow(ModelConfig(image_size=8, channels=1, patch_size=2, width=32, blocks=2,
        ...                         layers=1, head_dim=16, num_classes=10))
        >>> classify(flow, torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    if not flow.config.num_classes:
        raise InputError("This model is unconditional: it has no classes to tell apart.")
    if draws < 1 or steps < 1 or not 0 < step_size < math.inf:
        raise InputError(
            f"draws {draws} and steps {steps} must be at least 1, "
            f"and step_size {step_size} finite and above 0."
        )
    seeds = range(len(images)) if seeds is None else seeds
    if not all(hasattr(seed, "__index__") for seed in seeds):
        raise InputError("Seeds are whole numbers; give integers.")
    if len(seeds) != len(images):
        raise InputError(f"{len(seeds)} seeds for {len(images)} images; give one seed per image.")
    if isinstance(noise, Sequence):
        require(len(noise) > 0, "There are no noise levels to classify at; give at least one.")
        each = [classify(flow, images, method, level, draws, seeds, steps, step_size) for level in noise]
        return sum(each[1:], each[0]) / len(each)
    flow.check_images(images)
    images = images.to(flow.device, flow.data_dtype)
    levels = flow.levels(_level(flow.config, noise), len(images))
    noised = [images]
    if noise is not False:
        noised = [add_noise(images, flow.config, seeds, draw, levels) for draw in range(draws)]
    if method in ("gradient", "normalised"):
        scores = _gradient(flow, noised, levels, steps, step_size)
        return scores / embedding_distances(flow) if method == "normalised" else scores
    if method == "exhaustive":
        return _exhaustive(flow, noised, levels)
    raise InputError(f"Unknown method {method}; known: gradient, normalised, exhaustive.")


def _level(config: ModelConfig, noise: bool | float) -> float | None:
    """The level that ``noise`` means; None where the flow has only one and no other is asked for."""
    if not isinstance(noise, bool):
        return noise
    if config.noise != "range":
        return None
    return config.noise_level if noise else config.noise_min


@torch.no_grad()
def embedding_distances(flow: TARFlow) -> Float[Tensor, " k"]:
    """Distance of each class from the unconditional embedding: root of Σ over blocks |E_k − e|².

    A class that lies on the unconditional embedding has the smallest number above 0 in place of 0.
    """
    total = torch.zeros(flow.config.num_classes or 0, device=flow.device, dtype=flow.data_dtype)
    for block in flow.blocks:
        table = block.class_table
        assert table is not None
        total += (table - table.mean(0)).to(total.dtype).square().sum(dim=1)
    return total.sqrt().clamp_min(torch.finfo(total.dtype).tiny)


@torch.inference_mode(False)
def _gradient(
    flow: TARFlow, draws: list[Tensor], levels: Tensor | None, steps: int, step_size: float
) -> Tensor:
    """Algorithm 1, and further steps of ascent on the mean log-density over the draws.

    Weights enter detached: autograd then keeps only what the path to the class logits needs.
    """
    encode = frozen(flow)
    draws, levels = [constant(images) for images in draws], None if levels is None else constant(levels)
    logits = torch.zeros(
        len(draws[0]), flow.config.num_classes or 0, device=flow.device, dtype=flow.data_dtype
    )
    rise = logits
    for _ in range(steps):
        rise = torch.zeros_like(logits)
        for images in draws:
            with torch.enable_grad():
                point = logits.detach().requires_grad_()
                weights = point.softmax(dim=-1).to(flow.dtype)
                log_prob = encode(images, weights, noise=levels).log_prob
                (slope,) = torch.autograd.grad(log_prob.sum(), point)
            rise += slope / len(draws)
        logits = logits + step_size * rise
    return rise if steps == 1 else logits


@torch.no_grad()
def _exhaustive(flow: TARFlow, draws: list[Tensor], levels: Tensor | None) -> Tensor:
    """Densities log p(x | k) for every class, several classes to a forward pass, averaged over the draws."""
    b, classes = len(draws[0]), flow.config.num_classes or 0
    together = max(1, _ROWS // max(1, b))
    total: Tensor | float = 0.0
    for images in draws:
        columns = []
        for ids in torch.arange(classes, device=flow.device).split(together):
            rows = images.repeat(len(ids), 1, 1, 1)
            row_levels = None if levels is None else levels.repeat(len(ids))
            log_prob = flow(rows, ids.repeat_interleave(b), noise=row_levels).log_prob
            columns.append(log_prob.view(len(ids), b))
        total = total + torch.cat(columns).T / len(draws)
    assert isinstance(total, Tensor)
    return total
