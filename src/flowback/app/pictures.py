"""Results as HTML: pictures inside the page itself, so that no file is written and no path is named."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowback.data.pixels import to_bytes

__all__ = ["bars", "data_url", "error", "number", "sentence", "stretched", "tiles"]

_SHOWN = 10
"""Classes with a bar; of more, the highest."""


def data_url(image: Float[Tensor, "c h w"]) -> str:
    """An image on [-1, 1] as a PNG in a data URL."""
    pixels = to_bytes(image[None])[0].permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def stretched(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Noise and what lies on its way, which leave [-1, 1]: each divided by its own largest value."""
    return images / images.flatten(1).abs().amax(1).clamp(min=1)[:, None, None, None]


def tiles(
    images: Float[Tensor, "b c h w"], names: Sequence[str], caption: str = "", large: bool = False
) -> str:
    """Images side by side, as many in a row as fit, each above its name."""
    shown = "".join(
        f'<figure><img src="{data_url(image)}" alt="{html.escape(name, quote=True)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for image, name in zip(images.cpu(), names, strict=True)
    )
    kind = "fb-tiles fb-large" if large else "fb-tiles"
    return (sentence(caption) if caption else "") + f'<div class="{kind}">{shown}</div>'


def sentence(text: str) -> str:
    """A line of text."""
    return f'<p class="fb-text">{html.escape(text)}</p>'


def error(text: str) -> str:
    """A sentence that says what to change."""
    return f'<p class="fb-error" role="alert">{html.escape(text)}</p>'


def number(value: float) -> str:
    """Four digits, and a minus that is one."""
    return f"{value:.4g}".replace("-", "−")


def bars(scores: Float[Tensor, " k"], names: Sequence[str], caption: str) -> str:
    """Scores as a table with bars from the lowest to the highest; of many classes, the highest ten."""
    low, high = float(scores.min()), float(scores.max())
    order = list(range(len(names)))
    if len(order) > _SHOWN:
        order = torch.topk(scores, _SHOWN).indices.tolist()
    best = int(scores.argmax())
    rows = ""
    for k in order:
        score = float(scores[k])
        rows += (
            f'<tr{" class=fb-best" if k == best else ""}><th scope="row">{html.escape(names[k])}</th>'
            f'<td class="fb-bar"><div style="width:{100 * (score - low) / max(high - low, 1e-9):.1f}%"></div>'
            f"</td><td>{number(score)}</td></tr>"
        )
    return f'<table class="fb-bars"><caption>{html.escape(caption)}</caption>{rows}</table>'
