"""The page: its tabs, and what happens when a button is pressed.

Each button has one handler, and each handler one result, as HTML. All of them share one place in Gradio's
queue, so that one flow works at a time and visitors wait in turn.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import gradio as gr
import torch
from jaxtyping import Float
from torch import Tensor

from flowback.app import pictures
from flowback.app.flows import Flows
from flowback.app.reading import DRAWS, read
from flowback.app.uploads import MOST_BYTES, Picture, read_picture
from flowback.checked import require
from flowback.errors import InputError
from flowback.model import Flow
from flowback.sampling import Sampler

__all__ = ["build"]

EACH, NONE = "each in turn", "no class"
MOST_IMAGES, MOST_STEPS, MOST_ROUNDS, MOST_GUIDANCE = 64, 16, 16, 10.0
"""What a visitor may ask for; the server checks it, whatever the page allows."""
CANVAS = 280
"""Side of the drawing area, in pixels."""


def build(flows: Flows) -> gr.Blocks:
    """The page for some flows."""
    flow = flows.own
    style = files("flowback.app").joinpath("style.css").read_text(encoding="utf-8")
    with gr.Blocks(title=f"flowback: {flows.names[0]}", analytics_enabled=False) as page:
        page.fill_width = False
        gr.HTML(_heading(flows), elem_id="heading", css_template="", head=f"<style>{style}</style>")
        with gr.Tab("Draw", id="draw"):
            _draw_tab(flow)
        with gr.Tab("Noise to image", id="way"):
            _way_tab(flow)
        with gr.Tab("Read an image", id="read"):
            _read_tab(flow)
        with gr.Tab("Interpolate", id="interpolate"):
            _interpolate_tab(flow)
        with gr.Tab("Inpaint", id="inpaint"):
            _inpaint_tab(flow)
        with gr.Tab("Compare", id="compare"):
            _compare_tab(flows)
    page.queue(default_concurrency_limit=1, max_size=20)
    return page


def _heading(flows: Flows) -> str:
    flow, config = flows.own, flows.own.config
    count = sum(parameter.numel() for parameter in flow.parameters())
    about = (
        f"{flows.names[0]}: images of {config.image_size}×{config.image_size}, "
        f"{config.num_classes or 'no'} classes, {config.blocks} blocks, {count:,} parameters."
    )
    return f"<h1>flowback</h1>{pictures.sentence(about)}"


# ---- Handlers: what visitors send is checked, and a mistake becomes a sentence where the result would be.


def _spoken(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, a function or a generator, with the sentence of an InputError as its result."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generate(*values: Any) -> Iterator[str]:
            try:
                yield from handler(*values)
            except InputError as error:
                yield pictures.error(str(error))

        return generate

    @functools.wraps(handler)
    def answer(*values: Any) -> Any:
        try:
            return handler(*values)
        except InputError as error:
            return pictures.error(str(error))

    return answer


def _connect(
    button: Any, handler: Callable[..., Any], inputs: Sequence[Any], outputs: Any, event: str = "click"
) -> None:
    """Run a handler in the one queue of all; it is no public interface."""
    getattr(button, event)(
        _spoken(handler),
        list(inputs),
        outputs,
        concurrency_limit=1,
        concurrency_id="flow",
        show_progress="minimal",
        api_visibility="private",
    )


def _whole(value: Any, name: str, low: int, high: int) -> int:
    fits = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    require(fits and value == int(value), f"{name} is a whole number from {low} to {high}.")
    return int(value)


def _guidance(value: Any, label: int | None, flow: Flow) -> float:
    fits = isinstance(value, (int, float)) and 0 <= value <= MOST_GUIDANCE
    require(fits, f"Guidance is a number from 0 to {MOST_GUIDANCE:g}.")
    require(value == 0 or label is not None, "Guidance needs a class: choose one, or set guidance to 0.")
    return float(value)


def _label(value: Any, flow: Flow) -> int | None:
    """A class id; None is unconditional."""
    if value == NONE or not flow.config.num_classes:
        return None
    return _whole(value, "A class", 0, flow.config.num_classes - 1)


def _seed(value: Any) -> int:
    return _whole(value, "The seed", 0, 2**32 - 1 - MOST_IMAGES)


def _class_name(flow: Flow, label: int | None) -> str:
    if label is None:
        return NONE
    return flow.classes[label] if flow.classes else f"class {label}"


def _class_names(flow: Flow) -> list[str]:
    return [_class_name(flow, label) for label in range(flow.config.num_classes or 0)]


def _picture(text: Any, flow: Flow) -> Picture | None:
    config = flow.config
    return read_picture(text, config.image_size, config.channels, config.tokens)


# ---- Fields that tabs share.


class _Fields(NamedTuple):
    label: gr.Dropdown
    seed: gr.Number
    guidance: gr.Slider


def _sample_fields(flow: Flow, each: bool = False) -> _Fields:
    """Class, seed and guidance in a row."""
    names = [(name, label) for label, name in enumerate(_class_names(flow))]
    choices: list[Any] = [*([(EACH, EACH)] if each and names else []), *names, (NONE, NONE)]
    with gr.Row():
        label = gr.Dropdown(
            choices, value=choices[0][1], label="Class", visible=bool(names), min_width=140, filterable=False
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
        guidance = gr.Slider(
            0, 4, value=1 if names else 0, step=0.1, label="Guidance", visible=bool(names), min_width=180
        )
    return _Fields(label, seed, guidance)


def _result(identity: str) -> gr.HTML:
    return gr.HTML("", elem_id=identity, elem_classes="fb-result", min_height=40)

from gradio.events import Dependency

class _PictureField(gr.HTML):
    """A picture that a visitor draws, drops, pastes or chooses; with marks, its tokens can be marked."""

    def __init__(self, flow: Flow, identity: str, name: str, marks: bool = False) -> None:
        grid = flow.config.grid
        boxes = "".join(
            f'<input type="checkbox" aria-label="row {token // grid + 1}, column {token % grid + 1}">'
            for token in range(flow.config.tokens)
        )
        overlay = (
            f'<div class="fb-tokens" role="group" aria-label="Parts to redraw" '
            f'style="grid-template-columns:repeat({grid},1fr)">{boxes}</div>'
        )
        regions = "".join(
            f'<button type="button" data-region="{region}">{region.capitalize()}</button>'
            for region in ("left", "right", "top", "bottom", "middle")
        )
        tools = (
            '<label>Pen <input class="fb-width" type="range" min="2" max="30" value="8"></label>'
            '<label>Colour <input class="fb-colour" type="color" value="#ffffff"></label>'
        )
        super().__init__(
            "",
            html_template=(
                f'<div class="fb-stage" data-most-bytes="{MOST_BYTES}">'
                f'<canvas width="{CANVAS}" height="{CANVAS}" tabindex="{-1 if marks else 0}" role="img" '
                f'aria-label="{name}"></canvas>{overlay if marks else ""}</div>'
                '<div class="fb-tools"><button type="button" class="fb-open">Choose a file</button>'
                '<input type="file" accept="image/*" hidden aria-label="Image file">'
                f'<button type="button" class="fb-clear">Clear</button>{regions if marks else tools}</div>'
                '<p class="fb-note" role="alert"></p>'
            ),
            js_on_load=files("flowback.app").joinpath("picture.js").read_text(encoding="utf-8"),
            elem_id=identity,
        )
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


def _field(image: Float[Tensor, "1 c h w"] | None, redraw: Tensor | None = None, error: str = "") -> str:
    """The value of a picture field that shows an image."""
    value: dict[str, Any] = {"image": "" if image is None else pictures.data_url(image[0]), "error": error}
    if redraw is not None:
        value["marked"] = redraw[0].nonzero()[:, 0].tolist()
    return json.dumps(value)


def _picture_field(flow: Flow, identity: str, name: str, marks: bool = False) -> tuple[gr.HTML, _Fields]:
    """A picture field with what it takes to fill it with a sample."""
    field = _PictureField(flow, identity, name, marks)
    fields = _sample_fields(flow)
    button = gr.Button("Use a sample", size="sm", elem_id=f"{identity}-sample")

    def take(text: Any) -> str:
        """A chosen file, as the flow sees it."""
        try:
            picture = _picture(text, flow)
        except InputError as error:
            return _field(None, error=str(error))
        return _field(picture.image, picture.redraw) if picture else _field(None)

    def fill(label: Any, seed: Any, guidance: Any) -> str:
        """A sample."""
        try:
            return _field(_sample(flow, label, seed, guidance))
        except InputError as error:
            return _field(None, error=str(error))

    _connect(field, take, [field], field, "upload")
    _connect(button, fill, fields, field)
    return field, fields


def _sample(flow: Flow, label: Any, seed: Any, guidance: Any) -> Float[Tensor, "1 c h w"]:
    checked = _label(label, flow)
    scale = _guidance(guidance, checked, flow)
    labels = None if checked is None else [checked]
    return flow.sample(labels, [_seed(seed)], guidance=scale).clamp(-1, 1).cpu()


def _given(text: Any, flow: Flow, fields: Sequence[Any]) -> Picture:
    """The picture of a field, or a sample in place of an empty one."""
    picture = _picture(text, flow)
    if picture is not None:
        return picture
    marked = json.loads(text).get("marked", []) if text else []
    redraw = torch.zeros(1, flow.config.tokens, dtype=torch.bool)
    redraw[0, marked] = True
    return Picture(_sample(flow, *fields), redraw)


# ---- Tabs.


def _names_of(flow: Flow, labels: list[int] | None, seeds: Sequence[int]) -> list[str]:
    if labels is None:
        return [f"seed {seed}" for seed in seeds]
    return [f"{_class_name(flow, k)}, seed {seed}" for k, seed in zip(labels, seeds, strict=True)]


def _labels_of(flow: Flow, label: Any, count: int) -> list[int] | None:
    """Class ids of so many images; None is unconditional."""
    if label == EACH and flow.config.num_classes:
        return [index % flow.config.num_classes for index in range(count)]
    checked = _label(label, flow)
    return None if checked is None else [checked] * count


def _stages(flow: Flow) -> list[str]:
    blocks = [f"after block {index}" for index in range(flow.config.blocks, 0, -1)]
    return ["noise", *blocks, "denoised"]


def _draw(flow: Flow, label: Any, seed: Any, guidance: Any, count: Any) -> Iterator[tuple[str, Tensor, list[str]]]:
    """Stage, images so far and their names, each time something is new."""
    count = _whole(count, "The number of images", 1, MOST_IMAGES)
    labels = _labels_of(flow, label, count)
    first, scale = _seed(seed), _guidance(guidance, None if labels is None else labels[0], flow)
    seeds = range(first, first + count)
    images = torch.zeros(count, flow.config.channels, flow.config.image_size, flow.config.image_size)
    stages, names = _stages(flow), _names_of(flow, labels, seeds)
    sampler = Sampler(flow, scale, batch_size=16)
    for index, (part, state) in enumerate(sampler.follow(labels, seeds)):
        stage = index % len(stages)
        images[part] = (state if stage >= len(stages) - 2 else pictures.stretched(state)).cpu().float()
        yield stages[stage], images, names


def _draw_tab(flow: Flow) -> None:
    fields = _sample_fields(flow, each=True)
    count = gr.Slider(1, MOST_IMAGES, value=16, step=1, label="Images")
    button = gr.Button("Draw", variant="primary", elem_id="draw-button")
    result = _result("draw-result")

    def draw(*values: Any) -> Iterator[str]:
        for stage, images, names in _draw(flow, *values):
            yield pictures.tiles(images, names, f"{stage[0].upper()}{stage[1:]}.")
        yield pictures.tiles(images, names)

    _connect(button, draw, [*fields, count], result)


def _way_tab(flow: Flow) -> None:
    gr.HTML(
        pictures.sentence(
            "The noise of a seed goes backwards through the blocks. Noise leaves the range of an image; each "
            "picture but the last two is divided by its largest value."
        )
    )
    fields = _sample_fields(flow)
    button = gr.Button("Follow", variant="primary", elem_id="way-button")
    result = _result("way-result")

    def follow(*values: Any) -> Iterator[str]:
        states, names = [], []
        for stage, images, _ in _draw(flow, *values, 1):
            states.append(images.clone())
            names.append(stage)
            yield pictures.tiles(torch.cat(states), names, large=True)

    _connect(button, follow, fields, result)


def _read_tab(flow: Flow) -> None:
    gr.HTML(pictures.sentence("Draw, drop, paste or choose an image; an empty field takes the sample below."))
    field, fields = _picture_field(flow, "read-picture", "Image to read")
    names = _class_names(flow)
    rules = [("Gradient", "gradient"), ("Normalised", "normalised"), ("Exhaustive", "exhaustive")]
    rule = gr.Radio(rules, value="gradient", label="Rule of the class scores", visible=bool(names))
    button = gr.Button("Read", variant="primary", elem_id="read-button")
    result = _result("read-result")

    def answer(text: Any, method: Any, *sample: Any) -> str:
        require(method in ("gradient", "normalised", "exhaustive"), "There is no such rule; reload the page.")
        picture = _given(text, flow, sample)
        found = read(flow, picture.image, None, method)
        words = (
            f"{found.bits_per_dim:.3f} bits/dim as 8-bit pixels, {found.nll:.3f} nats/dim with the noise of "
            f"training; unconditional, mean of {DRAWS} draws of the noise."
        )
        unit = {
            "gradient": "slope of log p along each class (nats per unit of logit)",
            "normalised": "slope of log p along each class, per distance of its embeddings",
            "exhaustive": "log p given each class (nats)",
        }[method]
        shown = pictures.sentence(words)
        if found.scores is not None:
            shown += pictures.bars(found.scores, names, f"Class scores: {unit}")
        images = torch.cat([picture.image, found.noised, pictures.stretched(found.z), found.again])
        kinds = ["the image", "with noise", "its z", "decoded from z"]
        exact = f"Decoded from z, the largest difference is {found.error:.1g} on [-1, 1]."
        return shown + pictures.tiles(images, kinds, exact, large=True)

    _connect(button, answer, [field, rule, *fields], result)


def _interpolate_tab(flow: Flow) -> None:
    gr.HTML(
        pictures.sentence(
            "The way between the z of two images, with one denoising step each. An empty field takes the "
            "sample below it; its class is that of its end of the way."
        )
    )
    with gr.Row():
        with gr.Column(min_width=280):
            first, first_fields = _picture_field(flow, "first-picture", "First image")
        with gr.Column(min_width=280):
            second, second_fields = _picture_field(flow, "second-picture", "Second image")
    steps = gr.Slider(3, MOST_STEPS, value=9, step=1, label="Images on the way")
    button = gr.Button("Interpolate", variant="primary", elem_id="interpolate-button")
    result = _result("interpolate-result")

    def answer(text: Any, other: Any, count: Any, *fields: Any) -> str:
        count = _whole(count, "The number of images", 3, MOST_STEPS)
        halves = (text, fields[:3]), (other, fields[3:])
        images = [_given(value, flow, half).image for value, half in halves]
        labels = [_label(half[0], flow) for _, half in halves]
        require(
            (labels[0] is None) == (labels[1] is None), "Give both images a class, or neither of them one."
        )
        ids = [None if label is None else [label] for label in labels]
        noised = [flow.add_noise(image, [seed]) for seed, image in enumerate(images)]
        way = flow.interpolate(*noised, steps=count, labels=ids[0], second_labels=ids[1], denoise=True)[0]
        names = [f"{index / (count - 1):.0%}" for index in range(count)]
        return pictures.tiles(way, names)

    _connect(button, answer, [first, second, steps, *first_fields, *second_fields], result)


def _inpaint_tab(flow: Flow) -> None:
    gr.HTML(
        pictures.sentence(
            "Mark what is to be redrawn: tap or drag, or Tab, arrows and space. The rest stays as it is. "
            "An empty field takes the sample below."
        )
    )
    field, fields = _picture_field(flow, "inpaint-picture", "Image to change", marks=True)
    with gr.Row():
        count = gr.Slider(1, 16, value=4, step=1, label="Redrawings", min_width=180)
        rounds = gr.Slider(1, MOST_ROUNDS, value=4, step=1, label="Rounds", min_width=180)
    button = gr.Button("Redraw", variant="primary", elem_id="inpaint-button")
    result = _result("inpaint-result")

    def answer(text: Any, count: Any, rounds: Any, *sample: Any) -> str:
        count, rounds = _whole(count, "Redrawings", 1, 16), _whole(rounds, "Rounds", 1, MOST_ROUNDS)
        picture, label = _given(text, flow, sample), _label(sample[0], flow)
        require(bool(picture.redraw.any()), "Nothing is marked: mark what is to be redrawn.")
        first, guidance = _seed(sample[1]), _guidance(sample[2], label, flow)
        clean = picture.image.expand(count, -1, -1, -1)
        done = flow.inpaint(
            flow.add_noise(clean, range(first, first + count)),
            ~picture.redraw,
            None if label is None else [label] * count,
            range(first, first + count),
            rounds=rounds,
            guidance=guidance,
            denoise=True,
        )
        places = picture.redraw[..., None].expand(count, -1, flow.config.token_dim)
        shown = torch.where(flow.images(places), done.images.cpu(), clean)
        order = done.log_prob.argsort(descending=True).tolist()
        names = ["before", *(f"seed {first + k}, {float(done.log_prob[k]):.0f} nats" for k in order)]
        kept = "The redrawn part is an exact draw given the kept one." if bool(done.exact.all()) else (
            "The kept part is exactly yours. The redrawn part only approximates a draw given the kept one: "
            f"had it not been held, the kept part would have moved by {float(done.drift.mean()):.2f} (root "
            "mean square on [-1, 1])."
        )
        return pictures.tiles(torch.cat([picture.image, shown[order]]), names, f"{kept} Best log p first.", True)

    _connect(button, answer, [field, count, rounds, *fields], result)


def _compare_tab(flows: Flows) -> None:
    if len(flows.names) < 2:
        gr.HTML(pictures.sentence("There is one flow here. Start the app with two runs to compare them."))
        return
    with gr.Row():
        one = gr.Dropdown(flows.names, value=flows.names[0], label="First flow", filterable=False)
        other = gr.Dropdown(flows.names, value=flows.names[1], label="Second flow", filterable=False)
    fields = _sample_fields(flows.own, each=True)
    count = gr.Slider(1, 32, value=10, step=1, label="Images of each")
    button = gr.Button("Compare", variant="primary", elem_id="compare-button")
    result = _result("compare-result")

    def answer(name: Any, second: Any, *values: Any) -> Iterator[str]:
        require(all(isinstance(value, str) for value in (name, second)), "Choose two flows.")
        shown = ""
        for chosen in (name, second):
            for _, images, names in _draw(flows[chosen], *values):
                part = shown + pictures.tiles(images, names, chosen)
                yield part
            shown = part

    _connect(button, answer, [one, other, *fields, count], result)