"""What several tabs of the page are made of: fields for samples and pictures, buttons, and results.

A button has one handler, and a handler one result, as HTML. All handlers share one place in Gradio's queue:
one flow works at a time, and visitors wait in turn.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import gradio as gr
from jaxtyping import Float
from torch import Tensor

from flowback.app import pictures
from flowback.app.inputs import (
    EACH,
    MOST_BYTES,
    NONE,
    Picture,
    guidance_scale,
    read_label,
    read_picture,
    read_seed,
)
from flowback.errors import InputError
from flowback.model import Flow

__all__ = [
    "SampleFields",
    "class_names",
    "connect",
    "given",
    "picture_field",
    "result",
    "sample_fields",
    "words",
]

CANVAS = 280
"""Side of the drawing area, in pixels."""


def words(text: str) -> gr.HTML:
    """A sentence on the page."""
    return gr.HTML(pictures.sentence(text), apply_default_css=False)


def result(identity: str) -> gr.HTML:
    """Where a handler's result appears; the page scrolls to what would be below its end."""
    scroll = "requestAnimationFrame(() => element.scrollIntoView({ block: 'nearest', behavior: 'smooth' }))"
    return gr.HTML(
        "",
        elem_id=identity,
        min_height=40,
        apply_default_css=False,
        js_on_load=f"watch('value', () => {scroll});",
    )


def connect(
    source: Any,
    handler: Callable[..., str | Iterator[str]],
    inputs: Sequence[Any],
    output: gr.HTML,
    event: str = "click",
) -> None:
    """Run a handler in turn; the sentence of an InputError becomes its result. It is no public interface."""
    getattr(source, event)(
        _spoken(handler),
        list(inputs),
        output,
        concurrency_limit=1,
        concurrency_id="flow",
        show_progress="minimal",
        api_visibility="private",
    )


def _spoken(handler: Callable[..., str | Iterator[str]]) -> Callable[..., Iterator[str]]:
    @functools.wraps(handler)
    def answer(*values: Any) -> Iterator[str]:
        try:
            shown = handler(*values)
            yield from [shown] if isinstance(shown, str) else shown
        except InputError as error:
            yield pictures.error(str(error))

    return answer


def class_names(flow: Flow) -> list[str]:
    """Names of the classes; numbers where the flow does not know them."""
    return list(flow.classes) or [f"class {label}" for label in range(flow.config.num_classes or 0)]


class SampleFields(NamedTuple):
    """What it takes to draw a sample."""

    label: gr.Dropdown
    seed: gr.Number
    guidance: gr.Slider


def sample_fields(flow: Flow, each: bool = False, first: int = 0) -> SampleFields:
    """Class, seed and guidance in a row.

    Args:
        flow: gives the classes.
        each: offer all classes in turn.
        first: the class and the seed at the beginning.
    """
    names = [(name, label) for label, name in enumerate(class_names(flow))]
    choices: list[Any] = [*([(EACH, EACH)] if each and names else []), *names, (NONE, NONE)]
    start = choices[min(first, len(choices) - 1)][1]
    shown = bool(names)
    with gr.Row():
        label = gr.Dropdown(
            choices, value=start, label="Class", visible=shown, min_width=170, filterable=False
        )
        seed = gr.Number(first, label="Seed", precision=0, minimum=0, min_width=100)
        guidance = gr.Slider(
            0, 4, value=1 if names else 0, step=0.1, label="Guidance", visible=shown, min_width=180
        )
    return SampleFields(label, seed, guidance)


def _picture_area(flow: Flow, identity: str, name: str, marks: bool) -> gr.HTML:
    """Where a visitor draws, drops, pastes or chooses a picture, or with ``marks`` marks its tokens."""
    hint = f"{'Drop' if marks else 'Draw, drop'}, paste or choose an image, or use a sample."
    boxes = _token_boxes(flow.config.grid) if marks else ""
    return gr.HTML(
        "",
        html_template=(
            f'<div class="fb-stage" data-most-bytes="{MOST_BYTES}">'
            f'<canvas width="{CANVAS}" height="{CANVAS}" tabindex="{-1 if marks else 0}" role="img" '
            f'aria-label="{name}"></canvas><div class="fb-hint">{hint}</div>{boxes}</div>'
            '<div class="fb-tools"><button type="button" class="fb-open">Choose a file</button>'
            '<input type="file" accept="image/*" hidden aria-label="Image file">'
            f'<button type="button" class="fb-clear">Clear</button>{_REGIONS if marks else _PEN}</div>'
            '<p class="fb-note" role="alert"></p>'
        ),
        js_on_load=files("flowback.app").joinpath("picture.js").read_text(encoding="utf-8"),
        elem_id=identity,
        apply_default_css=False,
    )


_REGIONS = "".join(
    f'<button type="button" data-region="{region}">{region.capitalize()}</button>'
    for region in ("left", "right", "top", "bottom", "middle")
)
_PEN = (
    '<label>Pen <input class="fb-width" type="range" min="2" max="30" value="8"></label>'
    '<label>Colour <input class="fb-colour" type="color" value="#ffffff"></label>'
)


def _token_boxes(grid: int) -> str:
    """A box to tick for each token, over the picture."""
    boxes = "".join(
        f'<input type="checkbox" aria-label="row {row + 1}, column {column + 1}">'
        for row in range(grid)
        for column in range(grid)
    )
    style = f"grid-template-columns:repeat({grid},1fr)"
    return f'<div class="fb-tokens" role="group" aria-label="Parts to redraw" style="{style}">{boxes}</div>'


def picture_field(
    flow: Flow, identity: str, name: str, marks: bool = False, first: int = 0
) -> tuple[gr.HTML, SampleFields]:
    """A picture field, and what it takes to fill it with a sample.

    Args:
        flow: gives size, tokens and classes.
        identity: of the element.
        name: what the picture is for.
        marks: the visitor marks tokens, and does not draw.
        first: as for :func:`sample_fields`.
    """
    field = _picture_area(flow, identity, name, marks)
    fields = sample_fields(flow, first=first)
    button = gr.Button("Use a sample", size="sm", elem_id=f"{identity}-sample")

    def take(text: Any) -> str:
        """A chosen file, as the flow sees it."""
        try:
            picture = read_picture(text, flow.config)
        except InputError as error:
            return json.dumps({"error": str(error)})
        return _value(picture)

    def fill(text: Any, *sample: Any) -> str:
        """A sample."""
        try:
            return _value(Picture(_sample(flow, *sample), read_picture(text, flow.config).redraw))
        except InputError as error:
            return json.dumps({"error": str(error)})

    connect(field, take, [field], field, "upload")
    connect(button, fill, [field, *fields], field)
    return field, fields


def _value(picture: Picture) -> str:
    """What a picture field holds to show this."""
    image = "" if picture.image is None else pictures.data_url(picture.image[0])
    return json.dumps({"image": image, "marked": picture.redraw[0].nonzero()[:, 0].tolist()})


def _sample(flow: Flow, label: Any, seed: Any, guidance: Any) -> Float[Tensor, "1 c h w"]:
    checked = read_label(label, flow.config)
    scale = guidance_scale(guidance, checked is not None)
    labels = None if checked is None else [checked]
    return flow.sample(labels, [read_seed(seed)], guidance=scale).clamp(-1, 1).cpu()


def given(text: Any, flow: Flow, sample: Sequence[Any]) -> tuple[Float[Tensor, "1 c h w"], Picture]:
    """The image of a picture field, or a sample in place of an empty one; and all that the field holds."""
    picture = read_picture(text, flow.config)
    return (_sample(flow, *sample) if picture.image is None else picture.image), picture
