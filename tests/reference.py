"""A slow, obvious TARFlow that the fast one is compared with, and flows to compare.

It shares no code with flowback: one image at a time, one token at a time, explicit loops over heads and
over the tokens that may be seen, no cache, no batched masks. It reads the weights of a flow by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowback import Flow, ModelConfig

TINY = {
    "image_size": 8,
    "channels": 1,
    "patch_size": 2,
    "width": 32,
    "blocks": 2,
    "layers": 2,
    "head_dim": 16,
}
"""16 tokens of 4 dimensions: small enough for Jacobians, large enough for two heads and both orders."""


def random_flow(
    dtype: torch.dtype = torch.float64, seed: int = 0, num_classes: int = 5, scale: float = 0.05, **changes
) -> Flow:
    """A flow far from the identity, as after training: ``scale`` is that of the output projection."""
    torch.manual_seed(seed)
    flow = Flow(ModelConfig(**{**TINY, "num_classes": num_classes, **changes})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "proj_out" in name:
                parameter.normal_(std=scale)  # 0.05 at width 32: log-scales of some 0.3
            elif "norm.weight" in name:
                parameter.normal_(1, 0.1)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return flow


def random_images(flow: Flow, batch: int, seed: int = 1) -> Tensor:
    """Uniform noise on [-1, 1] in the flow's shape and dtype."""
    config, generator = flow.config, torch.Generator().manual_seed(seed)
    shape = (batch, config.channels, config.image_size, config.image_size)
    return 2 * torch.rand(shape, generator=generator, dtype=flow.dtype) - 1


class ReferenceFlow:
    """The flow of one set of weights, for one image (C, H, W) and one label at a time."""

    def __init__(self, flow: Flow) -> None:
        self.config = flow.config
        self.weights = {name: value.detach() for name, value in flow.state_dict().items()}

    @torch.no_grad()
    def encode(self, image: Tensor, label: int | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Noise (N, D), log-determinant, and the hidden states (N, W) of every block's last layer."""
        x, log_det, hidden = self.cut(image), torch.zeros((), dtype=image.dtype), []
        for t in range(self.config.blocks):
            order = self.order(t)
            z = x.clone()
            states = torch.empty(self.config.tokens, self.config.width, dtype=image.dtype)
            for place, token in enumerate(order):
                seen = [x[other] for other in order[: place + 1]]
                states[token] = self.transform(t, seen, label)
                if place + 1 < len(order):
                    log_scale, shift = self.project(t, states[token])
                    following = order[place + 1]
                    z[following] = (x[following] - shift) / torch.exp(log_scale)
                    log_det = log_det - log_scale.sum()
            x = z
            hidden.append(states)
        return x, log_det, hidden

    @torch.no_grad()
    def decode(self, z: Tensor, label: int | None) -> Tensor:
        """The image (C, H, W) of noise (N, D); every token sees the whole prefix anew."""
        for t in reversed(range(self.config.blocks)):
            order = self.order(t)
            known = [z[order[0]]]
            for token in order[1:]:
                log_scale, shift = self.project(t, self.transform(t, known, label))
                known.append(shift + torch.exp(log_scale) * z[token])
            x = torch.empty_like(z)
            for place, token in enumerate(order):
                x[token] = known[place]
            z = x
        return self.paste(z)

    def order(self, t: int) -> list[int]:
        tokens = list(range(self.config.tokens))
        return tokens if t % 2 == 0 else tokens[::-1]

    def cut(self, image: Tensor) -> Tensor:
        size, patches = self.config.patch_size, []
        for row in range(self.config.grid):
            for column in range(self.config.grid):
                patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
                patches.append(patch.flatten())
        return torch.stack(patches)

    def paste(self, tokens: Tensor) -> Tensor:
        size, side, channels = self.config.patch_size, self.config.image_size, self.config.channels
        image = torch.empty(channels, side, side, dtype=tokens.dtype)
        for index, token in enumerate(tokens):
            row, column = divmod(index, self.config.grid)
            patch = token.view(channels, size, size)
            image[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = patch
        return image

    def transform(self, t: int, seen: list[Tensor], label: int | None) -> Tensor:
        """Hidden state of the last token in ``seen``, the prefix of block t's order."""
        block, order = f"blocks.{t}.", self.order(t)
        states = []
        for place, value in enumerate(seen):
            state = self.linear(block + "proj_in", value)
            if self.config.position == "learned":
                state = state + self.weights[block + "position"][order[place]]
            if self.config.num_classes:
                table = self.weights[block + "class_table"]
                state = state + (table.mean(0) if label is None else table[label])
            states.append(state)
        for index in range(self.config.depths[t]):
            layer = f"{block}body.layers.{index}."
            attended = self.attend(layer + "attention.", states, order)
            states = [state + added for state, added in zip(states, attended, strict=True)]
            states = [state + self.mlp(layer + "mlp.", state) for state in states]
        return states[-1]

    def attend(self, name: str, states: list[Tensor], order: list[int]) -> list[Tensor]:
        """What each of ``states`` gathers from itself and those before it."""
        width, size = self.config.width, self.config.head_dim
        rows = [self.linear(name + "qkv", self.norm(name + "norm", state)) for state in states]
        heads = []
        for start in range(0, width, size):
            queries = [row[start : start + size] for row in rows]
            keys = [row[width + start : width + start + size] for row in rows]
            values = [row[2 * width + start : 2 * width + start + size] for row in rows]
            if self.config.qk_norm:
                queries = [self.rms_norm(name + "q_norm", query) for query in queries]
                keys = [self.rms_norm(name + "k_norm", key) for key in keys]
            if self.config.position == "rope":
                queries = [self.turn(query, order[place]) for place, query in enumerate(queries)]
                keys = [self.turn(key, order[place]) for place, key in enumerate(keys)]
            gathered = []
            for place, query in enumerate(queries):
                scores = [float(query @ key) / math.sqrt(size) for key in keys[: place + 1]]
                shares = [math.exp(score - max(scores)) for score in scores]
                mixed = sum(share * value for share, value in zip(shares, values, strict=False))
                gathered.append(mixed / sum(shares))
            heads.append(gathered)
        return [self.linear(name + "proj", torch.cat(parts)) for parts in zip(*heads, strict=True)]

    def turn(self, vector: Tensor, token: int) -> Tensor:
        """Rotary code: pairs (i, i + e/2); the first half of the pairs turns by row, the second by column."""
        row, column = divmod(token, self.config.grid)
        half = len(vector) // 2
        quarter = half // 2
        angles = [row * 10_000.0 ** (-i / quarter) for i in range(quarter)]
        angles += [column * 10_000.0 ** (-i / quarter) for i in range(quarter)]
        # The flow keeps these tables in fp32, also in float64.
        cos = torch.tensor([math.cos(angle) for angle in angles]).to(vector.dtype)
        sin = torch.tensor([math.sin(angle) for angle in angles]).to(vector.dtype)
        first, second = vector[:half], vector[half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def mlp(self, name: str, state: Tensor) -> Tensor:
        x = self.linear(name + "up", self.norm(name + "norm", state))
        if self.config.mlp == "swiglu":
            gate, value = x[: len(x) // 2], x[len(x) // 2 :]
            x = gate / (1 + torch.exp(-gate)) * value
        else:
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return self.linear(name + "down", x)

    def project(self, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the token that follows."""
        both = self.linear(f"blocks.{t}.proj_out", state)
        log_scale, shift = both[: self.config.token_dim], both[self.config.token_dim :]
        if self.config.log_scale_bound is not None:
            bound = self.config.log_scale_bound
            log_scale = both.new_tensor([bound * math.tanh(float(s) / bound) for s in log_scale])
        return log_scale, shift

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[name + ".weight"] @ x + self.weights[name + ".bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        scaled = centred / torch.sqrt((centred**2).mean() + 1e-5)
        return scaled * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean() + 1e-6) * self.weights[name + ".weight"]


# Gradients of hidden states on the generative pass, by plain autograd. These use flowback's blocks: what
# they check is where gradients flow. All take the noise z (detached) and the inputs x of every block, and
# return hidden states by (block, layer), in the graph of their reading of the reverse pass.


def decode_with_autograd(flow, z, labels, drop, locations, levels=None, whole=False) -> dict:
    """The paper's naive reverse pass: one token after another, the prefix anew each time.

    ``whole`` runs the block on all tokens, zeros where they are not known yet: the one thing that TARFlow's
    block offers without its cache. The prefix alone takes half of that.
    """
    hidden = {}
    for t in range(len(flow.blocks), min(block for block, _ in locations) - 1, -1):
        block = flow.blocks[t - 1]
        context = block.context(labels, drop, levels)
        first, *rest = block.reorder(z).unbind(1)
        known = [first]
        for token in rest:
            i = len(known)
            unknown = z.shape[1] - i if whole else 1  # a token's own value plays no part in its prediction
            prefix = torch.stack([*known, *[torch.zeros_like(token)] * unknown], dim=1)
            shift, log_scale, _ = block.predict(block.reorder(prefix), context)
            known.append(block.reorder(shift)[:, i] + torch.exp(block.reorder(log_scale)[:, i]) * token)
        z = block.reorder(torch.stack(known, dim=1))
        read_hidden(hidden, block, t, z, context, locations)
    return hidden


def decode_with_autograd_and_cache(flow, z, labels, drop, locations) -> dict:
    """The same with keys and values kept: each token passes through the block once (no rotary code)."""
    hidden = {}
    for t in range(len(flow.blocks), min(block for block, _ in locations) - 1, -1):
        block = flow.blocks[t - 1]
        context = block.context(labels, drop)
        positions = block.reorder(block.position, dim=0)
        tokens = block.reorder(z).split(1, dim=1)
        cache = [None] * len(block.body.layers)
        known = [tokens[0]]
        for i, token in enumerate(tokens[1:]):
            h = block.proj_in(known[i]) + positions[i]
            h = h if context is None else h + context[:, None]
            for index, layer in enumerate(block.body.layers):
                attention = layer.attention
                qkv = attention.qkv(attention.norm(h))
                q, k, v = qkv.view(len(h), 3, -1, 1, attention.head_dim).unbind(1)
                if i > 0:
                    k, v = (
                        torch.cat([old, new], dim=2) for old, new in zip(cache[index], (k, v), strict=True)
                    )
                cache[index] = k, v
                y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                h = h + attention.proj(y.flatten(1)[:, None])
                h = h + layer.mlp(h)
            log_scale, shift = block.proj_out(h).chunk(2, dim=-1)
            known.append(shift + torch.exp(log_scale) * token)
        z = block.reorder(torch.cat(known, dim=1))
        read_hidden(hidden, block, t, z, context, locations)
    return hidden


def decode_with_sweeps(flow, z, labels, drop, locations, levels=None, *, sweeps: int) -> dict:
    """Each block's input recomputed by parallel sweeps x = Phi(x, z) from its known, detached value.

    One sweep is Algorithm 2 of arXiv 2511.22345 with the features read from the recomputed input (order 0);
    k + 1 sweeps carry the gradient of order k.
    """
    hidden, inputs = {}, block_inputs(flow, z, labels, drop, levels)
    for t in range(len(flow.blocks), min(block for block, _ in locations) - 1, -1):
        block = flow.blocks[t - 1]
        context = block.context(labels, drop, levels)
        x = inputs[t]
        for _ in range(sweeps):
            shift, log_scale, _ = block.predict(x, context)
            x = shift + torch.exp(log_scale) * z
        z = x
        read_hidden(hidden, block, t, z, context, locations)
    return hidden


def decode_to_the_letter(flow, z, labels, drop, locations) -> dict:
    """Algorithm 2 of arXiv 2511.22345 to the letter: features come from the run on the detached context."""
    hidden, inputs = {}, block_inputs(flow, z, labels, drop)
    for t in range(len(flow.blocks), min(block for block, _ in locations) - 1, -1):
        block = flow.blocks[t - 1]
        layers = [layer for place, layer in locations if place == t]
        shift, log_scale, states = block.predict(inputs[t], block.context(labels, drop), layers)
        z = shift + torch.exp(log_scale) * z
        hidden.update({(t, layer): state for layer, state in states.items()})
    return hidden


def read_hidden(hidden, block, t, x, context, locations) -> None:
    layers = [layer for place, layer in locations if place == t]
    if layers:
        states = block.predict(x, context, layers).hidden
        hidden.update({(t, layer): state for layer, state in states.items()})


@torch.no_grad()
def block_inputs(flow, z, labels, drop, levels=None) -> dict[int, Tensor]:
    """The input of every block, counted from 1, whose encoding is z."""
    inputs = {}
    for t in range(len(flow.blocks), 0, -1):
        block = flow.blocks[t - 1]
        z = inputs[t] = block.inverse(z, block.context(labels, drop, levels))
    return inputs
