"""Self-attention, causal or over all tokens. Keys and values live in a cache that the caller owns.

Letters in shapes: b images, n tokens of the call, m tokens known so far, h heads, e head width, w width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention", "KVCache", "Rotary", "rotary_table"]


class Rotary(NamedTuple):
    """Cosines and sines of the rotary position code, one row a token."""

    cos: Float[Tensor, "n e"]
    sin: Float[Tensor, "n e"]


def rotary_table(grid: int, head_dim: int, base: float = 10_000.0) -> Rotary:
    """Axial rotary code of a square token grid: half of the head turns with the row, half with the column.

    RoFormer (arXiv 2104.09864) in each axis, with frequencies base^(-2i/(e/2)). The attention score of two
    tokens then depends on the difference of their rows and of their columns only.
    """
    quarter = head_dim // 4
    frequencies = base ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    place = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, e/4)
    rows = place[:, None].expand(grid, grid, quarter)
    columns = place[None, :].expand(grid, grid, quarter)
    half = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim // 2)
    angle = torch.cat([half, half], dim=-1)  # pairs (i, i + e/2) turn together
    return Rotary(angle.cos().float(), angle.sin().float())


def _rotate(x: Float[Tensor, "b h n e"], rotary: Rotary) -> Float[Tensor, "b h n e"]:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * rotary.cos + turned * rotary.sin).type_as(x)


@dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of one block's layers; filled from the left as tokens become known."""

    keys: Float[Tensor, "l b h n e"]
    values: Float[Tensor, "l b h n e"]

    @classmethod
    def empty(cls, layers: int, batch: int, heads: int, tokens: int, head_dim: int, like: Tensor) -> KVCache:
        """Room for ``tokens`` tokens, with the device and dtype of ``like``."""
        shape = (layers, batch, heads, tokens, head_dim)
        return cls(like.new_empty(shape), like.new_empty(shape))


class Attention(nn.Module):
    """Pre-normalised multi-head self-attention; with ``causal``, no token sees those after it."""

    def __init__(self, width: int, head_dim: int, qk_norm: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.head_dim, self.causal = head_dim, causal
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        rotary: Rotary | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int | Tensor = 0,
        temperature: float | Tensor = 1.0,
    ) -> Float[Tensor, "b n w"]:
        """Attend from tokens ``start``, ``start`` + 1, ... to themselves and all before them.

        Without ``causal`` the call holds the whole sequence, and every token sees all.

        Args:
            x: the tokens of this call.
            rotary: position code of these tokens.
            cache: keys and values of this layer, (b, h, N, e) each; rows before ``start`` are read, those
                of this call are written. None when the call holds the whole sequence.
            start: index of the first token of the call. For a single token it may be a tensor of one element,
                which is read on the device only; all rows of the cache must then be finite.
            temperature: divides the attention logits; a number, or a tensor (b, 1, 1, 1) for one per image.
        """
        b, n, width = x.shape
        qkv = self.qkv(self.norm(x)).view(b, n, 3, -1, self.head_dim)
        q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))  # (b, h, n, e) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        if isinstance(temperature, Tensor) or temperature != 1.0:
            q = q / temperature
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and n > 1)
        elif isinstance(start, Tensor):
            keys, values = cache
            keys.index_copy_(2, start, k.type_as(keys))
            values.index_copy_(2, start, v.type_as(values))
            seen = torch.arange(keys.shape[2], device=x.device) <= start
            y = F.scaled_dot_product_attention(q, keys.type_as(q), values.type_as(q), attn_mask=seen[None])
        else:
            keys, values = cache
            end = start + n
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            mask = None
            if n > 1:  # token start + i sees the first start + i + 1 tokens
                mask = torch.ones(n, end, dtype=torch.bool, device=x.device).tril(start)
            keys, values = keys[:, :, :end].type_as(q), values[:, :, :end].type_as(q)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(b, n, width))
