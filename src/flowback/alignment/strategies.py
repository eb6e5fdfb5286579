"""Where the gradient of the alignment flows: the strategies differ in this, and in nothing else.

All of them read the same hidden states from the encode pass. ``forward`` leaves them in its graph. The
others cut that graph: the gradient of the alignment must not reach the data side through the encode pass,
while that of the likelihood must. One autograd.Function therefore spans the blocks s ... T, s the lowest
aligned one. Its forward runs each block once, on a detached input, and keeps that block's graph. Its
backward receives the gradients of the noise, of the log-determinant and of all hidden states in one call:

    A, upwards    the alignment's gradient u_t of each block's input x_t-1, on the generative pass z -> x
    B, downwards  the likelihood's gradient, exactly as in plain training, and each block's parameter
                  gradient of both losses in one pass over its graph

The generative pass solves x = Phi(x, z) with Phi(x, z) = shift(x) + exp(log_scale(x)) z. With N = dPhi/dx,
nilpotent, the gradient g that meets x becomes u = (I - N^T)^-1 g = g + N^T g + ... Every factor is known
from the encode pass: nothing is decoded, and nothing is sequential over tokens. docs/method.md has the
derivation. Stage A and the likelihood's way to the blocks below take no weight gradients, so that they
cost about as much as a forward pass each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowback.alignment.back_substitution import recording
from flowback.config import AlignmentConfig
from flowback.errors import InputError
from flowback.flow import FlowOutput, TARFlow, affine
from flowback.flow.block import Block, Labels

__all__ = ["complete_series", "encode", "truncated_series"]


Order = int | Literal["exact"]
Pairs = list[tuple[Tensor, Tensor | None]]
"""Outputs of a graph, each with its gradient; None counts as zero."""


def encode(
    flow: TARFlow,
    images: Float[Tensor, "b c h w"],
    labels: Labels,
    drop: Bool[Tensor, " b"] | None,
    config: AlignmentConfig,
    levels: Float[Tensor, " b"] | None = None,
) -> FlowOutput:
    """The encode pass, with the hidden states of ``config.locations`` in the graph of its strategy.

    Values are those of ``flow(...)``, bit for bit, whatever the strategy; so is the gradient of the
    likelihood. Parameters that an alignment loss at (block t, any layer) reaches:

    ==================  =====================================================================
    forward             blocks 1 ... t: the encode pass
    detach              block t
    reverse             blocks t ... T: the generative pass, z held fixed
    reverse-literal     block t: Algorithm 2 of arXiv 2511.22345 read to the letter, whose
                        features come from the block run on its detached context. The
                        recomputed input never meets the loss, so this *is* detach.
    ==================  =====================================================================

    ``reverse`` keeps ``config.order`` terms of the series beyond the identity; order 0 is Algorithm 2 with
    the features read from the recomputed input; ``exact`` is decoding under autograd. The result takes one
    backward pass (both losses together); soft ``labels`` and noise ``levels`` get no gradient from the blocks
    s ... T, whose embeddings of them do.

    Raises:
        InputError: a location outside the flow.
    """
    locations = config.locations if config.strategy != "none" else ()
    for place in set(locations).difference(flow.config.locations):
        raise InputError(
            f"--alignment.locations: {place} is outside the model; {flow.config.locations_in_words}."
        )
    if config.strategy in ("none", "forward") or not torch.is_grad_enabled():
        return flow(images, labels, drop, hidden=locations, noise=levels)

    blocks = list(flow.blocks)
    below = min(t for t, _ in locations) - 1
    x = flow.tokens(images)
    log_det = torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for output in itertools.islice(flow.encode_blocks(x, labels, drop, levels=levels), below):
        x, log_det = output.z, log_det + output.log_det
    span = _Span(
        blocks=blocks[below:],
        layers=[[layer for t, layer in locations if t == index + 1] for index in range(below, len(blocks))],
        labels=labels,
        drop=drop,
        levels=levels,
        order=config.order if config.strategy == "reverse" else None,
        tolerance=config.tolerance,
    )
    parameters = [parameter for block in span.parameters() for parameter in block]
    z, log_det, *states = _Blocks.apply(span, x, log_det, *parameters)
    places = [(below + i, layer) for i, layers in enumerate(span.layers, start=1) for layer in layers]
    return FlowOutput(z, log_det, dict(zip(places, states, strict=True)))


def truncated_series(gradient: Tensor, apply: Callable[[Tensor], Tensor], order: int, length: int) -> Tensor:
    """The sum u = g + N^T g + ... + (N^T)^order g.

    Args:
        gradient: g.
        apply: r -> N^T r.
        order: terms kept beyond the identity.
        length: tokens of the sequence; (N^T)^length = 0, so later terms are not computed.
    """
    total = term = gradient
    for _ in range(min(order, length - 1)):
        term = apply(term)
        total = total + term
    return total


def complete_series(
    gradient: Float[Tensor, "b n d"],
    apply: Callable[[Tensor], Tensor],
    tolerance: float,
    length: int,
) -> Float[Tensor, "b n d"]:
    """The u with u = g + N^T u, to a tolerance.

    What remains of the series after k terms is g - (I - N^T) u. Among all combinations of these terms the
    one with the smallest remainder is taken, image by image: GMRES (Saad and Schultz 1986), in the form
    that orthogonalises the images A p of the directions, A = I - N^T. It is never behind the plain sum,
    needs some two thirds of its passes on trained flows, and does not follow terms that grow before they
    vanish. With ``length`` vectors it is complete, since (N^T)^length = 0. Each pass begins with one question
    to the device, whether the remainder is small: a needless pass takes longer than the answer.

    Args:
        gradient: g.
        apply: r -> N^T r.
        tolerance: stops when the remainder's 2-norm over the batch is below this share of the sum's.
        length: tokens of the sequence.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(1, 2), keepdim=True)

    total, rest, direction = torch.zeros_like(gradient), gradient, gradient
    pairs: list[tuple[Tensor, Tensor]] = []  # p and A p, the latter orthonormal
    while len(pairs) < length and bool(rest.norm() > tolerance * total.norm()):
        p, image = direction, direction - apply(direction)
        for earlier, known in pairs:
            share = dot(image, known)
            p, image = p - share * earlier, image - share * known
        # An image that is done has nothing left to normalise.
        scale = dot(image, image).sqrt().clamp_min(torch.finfo(image.dtype).tiny)
        p, image = p / scale, image / scale
        step = dot(rest, image)
        total, rest, direction = total + step * p, rest - step * image, image
        pairs.append((p, image))
    return total


@dataclass
class _Span:
    """The blocks s ... T that run in one autograd node, and how."""

    blocks: Sequence[Block]
    layers: Sequence[Sequence[int]]
    """Layers of each block whose hidden states are aligned."""
    labels: Labels
    drop: Tensor | None
    levels: Tensor | None
    order: Order | None
    """Order of the reverse gradient; None: the generative pass carries no gradient."""
    tolerance: float

    def parameters(self) -> list[list[Tensor]]:
        """The trainable parameters of each block."""
        return [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]


class _Graph:
    """One block on its detached input, with the graph from there, and from the parameters, to the outputs."""

    def __init__(self, block: Block, x: Tensor, layers: Sequence[int], span: _Span) -> None:
        self.x = x.detach().requires_grad_()
        # In this graph, for the sake of the class table and of the level's embedding.
        context = block.context(span.labels, span.drop, span.levels)
        exact = span.order == "exact"
        with recording(block, len(x)) if exact else nullcontext() as self.encoding:
            self.shift, self.log_scale, hidden = block.predict(self.x, context, layers)
        self.z = affine.forward(self.x, self.shift, self.log_scale)
        self.log_det = affine.log_det(self.log_scale)
        self.hidden = [hidden[layer] for layer in layers]

    def input_gradient(self, pairs: Pairs) -> Tensor | None:
        """Gradient of x alone, without those of the weights; the graph stays."""
        return _vjp(pairs, [self.x], keep=True)[0]

    def reverse(self, gradient: Tensor, order: Order, tolerance: float) -> tuple[Tensor, Pairs]:
        """Stage A in one block: from g, that meets x, the gradients of z and of (shift, log_scale)."""
        values = self.x.detach(), self.shift.detach(), self.log_scale.detach()

        def pairs(r: Tensor) -> tuple[Tensor, Pairs]:
            grad_z, grad_shift, grad_log_scale = affine.inverse_vjp(r, *values)
            return grad_z, [(self.shift, grad_shift), (self.log_scale, grad_log_scale)]

        def apply(r: Tensor) -> Tensor:
            return cast(Tensor, self.input_gradient(pairs(r)[1]))

        length = self.x.shape[1]
        if order != "exact":
            return pairs(truncated_series(gradient, apply, order, length))
        if self.encoding is not None and self.encoding.complete:
            return pairs(self.encoding.solve(gradient, *values))
        return pairs(complete_series(gradient, apply, tolerance, length))


def _vjp(pairs: Pairs, inputs: Sequence[Tensor], keep: bool) -> list[Tensor | None]:
    """Gradients of ``inputs``, from all outputs at once."""
    known = [(output, gradient) for output, gradient in pairs if gradient is not None]
    if not known or not inputs:
        return [None] * len(inputs)
    outputs, gradients = zip(*known, strict=True)
    return list(torch.autograd.grad(outputs, inputs, gradients, retain_graph=keep, allow_unused=True))


class _Blocks(torch.autograd.Function):
    """(x_s-1, log_det, parameters) -> (z, log_det, hidden states); stages A and B of the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        span: _Span,
        x: Tensor,
        log_det: Tensor,
        *parameters: Tensor,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        graphs = []
        for block, layers in zip(span.blocks, span.layers, strict=True):
            with torch.enable_grad():
                graphs.append(_Graph(block, x, layers, span))
            x, log_det = graphs[-1].z, log_det + graphs[-1].log_det
        ctx.set_materialize_grads(False)
        ctx.span, ctx.graphs = span, graphs
        return x.detach(), log_det, *(state.detach() for graph in graphs for state in graph.hidden)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_log_det: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.graphs is None:
            raise RuntimeError(
                "The graph of the aligned blocks is gone after one backward pass; add the losses and call "
                "backward once, or encode again."
            )
        span, graphs, ctx.graphs = ctx.span, ctx.graphs, None
        incoming = iter(grads)
        alignment: list[Pairs] = [[(state, next(incoming)) for state in graph.hidden] for graph in graphs]

        if span.order is not None:  # A: upwards, along the generative pass
            below = None
            for graph, pairs in zip(graphs, alignment, strict=True):
                gradient = _sum(graph.input_gradient(pairs), below)
                if gradient is not None:
                    below, more = graph.reverse(gradient, span.order, span.tolerance)
                    pairs.extend(more)

        parameter_gradients: list[Tensor | None] = []
        for parameters in reversed(span.parameters()):  # B: downwards; each graph goes when its block is done
            graph, pairs = graphs.pop(), alignment.pop()
            likelihood: Pairs = [(graph.z, grad_z), (graph.log_det, grad_log_det)]
            wanted = bool(graphs) or ctx.needs_input_grad[1]
            if all(gradient is None for _, gradient in pairs):  # both at once, as in plain training
                grad_z, *block_gradients = _vjp(likelihood, [graph.x, *parameters], keep=False)
            else:
                grad_z = graph.input_gradient(likelihood) if wanted else None
                block_gradients = _vjp(likelihood + pairs, parameters, keep=False)
            parameter_gradients = block_gradients + parameter_gradients
        return None, grad_z, grad_log_det, *parameter_gradients


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
