"""The page: its tabs, and what their buttons do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from flowback.app import pictures
from flowback.app.fields import class_names, connect, given, picture_field, result, sample_fields, words
from flowback.app.flows import Flows
from flowback.app.image_figures import DRAWS, read
from flowback.app.inputs import (
    MOST_IMAGES,
    guidance_scale,
    read_label,
    read_labels,
    read_seed,
    whole,
)
from flowback.checked import require
from flowback.model import Flow
from flowback.sampling import Sampler

__all__ = ["build"]

MOST_STEPS, MOST_ROUNDS, MOST_REDRAWN, MOST_COMPARED = 16, 16, 16, 32
AT_ONCE = 16
"""Images that are decoded, and appear, together."""
UNITS = {
    "gradient": "slope of log p along each class (nats per unit of logit)",
    "normalised": "slope of log p along each class, per distance of its embeddings",
    "exhaustive": "log p given each class (nats)",
}
"""What the scores of each rule are."""


def build(flows: Flows) -> gr.Blocks:
    """The page for some flows."""
    flow = flows.own
    style = files("flowback.app").joinpath("style.css").read_text(encoding="utf-8")
    tabs = {
        "Draw": _draw_tab,
        "Trajectory": _trajectory_tab,
        "Read": _read_tab,
        "Interpolate": _interpolate_tab,
        "Inpaint": _inpaint_tab,
    }
    with gr.Blocks(title=f"flowback: {flows.names[0]}", analytics_enabled=False) as page:
        gr.HTML(_heading(flows), elem_id="heading", head=f"<style>{style}</style>", apply_default_css=False)
        for name, tab in tabs.items():
            with gr.Tab(name):
                tab(flow)
        with gr.Tab("Compare"):
            _compare_tab(flows)
    page.queue(default_concurrency_limit=1, max_size=20)
    return page


def _heading(flows: Flows) -> str:
    return f"<h1>flowback</h1>{pictures.sentence(f'{flows.names[0]}: {flows.own.about}')}"


def _draw(
    flow: Flow, label: Any, seed: Any, guidance: Any, count: int
) -> Iterator[tuple[str, Tensor, list[str]]]:
    """What is new, images so far and their names, each time something is."""
    labels, first = read_labels(label, flow.config, count), read_seed(seed)
    scale = guidance_scale(guidance, labels is not None)
    kinds = [""] * count if labels is None else [f"{class_names(flow)[k]}, " for k in labels]
    names = [f"{kind}seed {first + index}" for index, kind in enumerate(kinds)]
    images = torch.zeros(count, flow.config.channels, flow.config.image_size, flow.config.image_size)
    sampler = Sampler(flow, scale, batch_size=AT_ONCE)
    stages = _stages(flow.config.blocks, len(sampler.levels))
    for index, (part, state) in enumerate(sampler.follow(labels, range(first, first + count))):
        stage = index % len(stages)
        images[part] = (state if stage >= flow.config.blocks else pictures.stretched(state)).cpu().float()
        end = part.start + len(state)
        whole_set = len(state) == count or (end == count and stage == len(stages) - 1)
        yield stages[stage] + ("" if whole_set else f", images {part.start + 1} to {end}"), images, names


def _stages(blocks: int, steps: int) -> list[str]:
    """Names of the states of a trajectory."""
    denoised = ["denoised"] if steps == 1 else [f"denoised {step}/{steps}" for step in range(1, steps + 1)]
    return ["noise", *(f"after block {block}" for block in range(blocks, 0, -1)), *denoised]


def _drawing_level(flow: Flow) -> float | None:
    """The noise level that images are drawn at; None for a flow of one level."""
    return flow.config.noise_max if flow.config.noise == "range" else None


def _draw_tab(flow: Flow) -> None:
    words("The noise of each seed becomes an image. Guidance makes its class clearer; 0 is off.")
    fields = sample_fields(flow, each=True)
    count = gr.Slider(1, MOST_IMAGES, value=16, step=1, label="Images")
    button = gr.Button("Draw", variant="primary", elem_id="draw-button")
    drawn = result("draw-result")

    def draw(label: Any, seed: Any, guidance: Any, count: Any) -> Iterator[str]:
        count = whole(count, "The number of images", 1, MOST_IMAGES)
        for stage, images, names in _draw(flow, label, seed, guidance, count):
            yield pictures.tiles(images, names, f"{stage.capitalize()}.")

    connect(button, draw, [*fields, count], drawn)


def _trajectory_tab(flow: Flow) -> None:
    words(
        "The noise of a seed goes backwards through the blocks. What comes before block 1 leaves the range "
        "of an image; each such picture is divided by its largest value."
    )
    fields = sample_fields(flow)
    button = gr.Button("Follow", variant="primary", elem_id="trajectory-button")
    states = result("trajectory-result")

    def follow(label: Any, seed: Any, guidance: Any) -> Iterator[str]:
        shown, names = [], []
        for stage, images, _ in _draw(flow, label, seed, guidance, 1):
            shown.append(images.clone())
            names.append(stage)
            yield pictures.tiles(torch.cat(shown), names, large=True)

    connect(button, follow, fields, states)


def _read_tab(flow: Flow) -> None:
    words("How likely the flow finds an image, which class it sees in it, and its z, which gives it back.")
    with gr.Row():
        with gr.Column(min_width=280):
            field, fields = picture_field(flow, "read-picture", "Image to read")
            labelled = bool(flow.config.num_classes)
            rules = [(name.capitalize(), name) for name in UNITS]
            rule = gr.Radio(rules, value="gradient", label="Rule of the class scores", visible=labelled)
            button = gr.Button("Read", variant="primary", elem_id="read-button")
        with gr.Column(min_width=280):
            reading = result("read-result")

    def answer(text: Any, method: Any, *sample: Any) -> str:
        require(isinstance(method, str) and method in UNITS, "There is no such rule; reload the page.")
        image, _ = given(text, flow, sample)
        found = read(flow, image, None, method)
        shown = pictures.sentence(
            f"{found.bits_per_dim:.3f} bits/dim as 8-bit pixels, {pictures.number(found.nll)} nats/dim with "
            f"the noise of training; unconditional, mean of {DRAWS} draws of the noise."
        )
        if found.scores is not None:
            shown += pictures.bars(found.scores, class_names(flow), f"Class scores: {UNITS[method]}")
        images = torch.cat([image, found.noised, pictures.stretched(found.z), found.again])
        exact = f"Decoded from z, the largest difference is {found.error:.7f} on [-1, 1]."
        return shown + pictures.tiles(
            images, ["image", "with noise", "its z", "decoded from z"], exact, large=True
        )

    connect(button, answer, [field, rule, *fields], reading)


def _interpolate_tab(flow: Flow) -> None:
    words(
        "Images between two, equally spaced between their z. The class below an image is that of its end; an "
        "empty field takes the sample below it."
    )
    with gr.Row():
        with gr.Column(min_width=280):
            first, first_sample = picture_field(flow, "first-picture", "First image")
        with gr.Column(min_width=280):
            second, second_sample = picture_field(flow, "second-picture", "Second image", first=1)
    steps = gr.Slider(3, MOST_STEPS, value=9, step=1, label="Images on the way")
    button = gr.Button("Interpolate", variant="primary", elem_id="interpolate-button")
    way = result("interpolate-result")

    def answer(text: Any, other: Any, steps: Any, *samples: Any) -> str:
        steps = whole(steps, "The number of images", 3, MOST_STEPS)
        ends = ((text, samples[:3]), (other, samples[3:]))
        ids = [read_label(sample[0], flow.config) for _, sample in ends]
        require((ids[0] is None) == (ids[1] is None), "Give both images a class, or neither of them one.")
        level = _drawing_level(flow)
        first, second = (
            flow.add_noise(given(held, flow, sample)[0].to(flow.device), [seed], noise=level)
            for seed, (held, sample) in enumerate(ends)
        )
        labels = [None if label is None else [label] for label in ids]
        found = flow.interpolate(first, second, steps, labels[0], labels[1], denoise=True, noise=level)[0]
        return pictures.tiles(found, [f"{index / (steps - 1):.0%}" for index in range(steps)])

    connect(button, answer, [first, second, steps, *first_sample, *second_sample], way)


def _inpaint_tab(flow: Flow) -> None:
    words("Mark what is to be redrawn: tap or drag, or Tab, arrows and space. The rest stays as it is.")
    with gr.Row():
        with gr.Column(min_width=280):
            field, fields = picture_field(flow, "inpaint-picture", "Image to change", marks=True)
            count = gr.Slider(1, MOST_REDRAWN, value=4, step=1, label="Redrawings")
            rounds = gr.Slider(1, MOST_ROUNDS, value=4, step=1, label="Rounds")
            button = gr.Button("Redraw", variant="primary", elem_id="inpaint-button")
        with gr.Column(min_width=280):
            redrawn = result("inpaint-result")

    def answer(text: Any, count: Any, rounds: Any, *sample: Any) -> str:
        count = whole(count, "The number of redrawings", 1, MOST_REDRAWN)
        rounds = whole(rounds, "The number of rounds", 1, MOST_ROUNDS)
        image, picture = given(text, flow, sample)
        require(bool(picture.redraw.any()), "Nothing is marked: mark what is to be redrawn.")
        return _inpainted(flow, image, picture.redraw, count, rounds, sample)

    connect(button, answer, [field, count, rounds, *fields], redrawn)


def _inpainted(
    flow: Flow, image: Tensor, redraw: Tensor, count: int, rounds: int, sample: Sequence[Any]
) -> str:
    """Redrawings of an image as HTML, the one of the highest density first."""
    labels, first = read_labels(sample[0], flow.config, count), read_seed(sample[1])
    scale, seeds = guidance_scale(sample[2], labels is not None), range(first, first + count)
    clean = image.to(flow.device).expand(count, -1, -1, -1)
    level = _drawing_level(flow)
    noised = flow.add_noise(clean, seeds, noise=level)
    options = {"rounds": rounds, "guidance": scale, "denoise": True, "noise": level}
    found = flow.inpaint(noised, ~redraw, labels, seeds, **options)
    places = redraw.to(clean)[..., None].expand(count, -1, flow.config.token_dim)
    shown = torch.where(flow.images(places) > 0, found.images, clean)  # the kept part without its noise
    order = found.log_prob.argsort(descending=True).tolist()
    names = ["before", *(f"seed {seeds[k]}, {float(found.log_prob[k]):.0f} nats" for k in order)]
    honest = (
        "The kept part is yours, and the redrawn part an exact draw given it."
        if bool(found.exact.all())
        else "The kept part is yours, unchanged. The redrawn part approximates a draw given it: not held, "
        f"the kept part would have moved by {float(found.drift.mean()):.2f} (root mean square on [-1, 1])."
    )
    return pictures.tiles(torch.cat([clean[:1], shown[order]]), names, f"{honest} Best log p first.", True)


def _compare_tab(flows: Flows) -> None:
    if len(flows.names) < 2:
        words("There is one flow here. Start the app with two runs to compare them.")
        return
    words("Two flows make images of the same noise.")
    with gr.Row():
        one = gr.Dropdown(
            flows.names, value=flows.names[0], label="First flow", filterable=False, min_width=280
        )
        other = gr.Dropdown(
            flows.names, value=flows.names[1], label="Second flow", filterable=False, min_width=280
        )
    fields = sample_fields(flows.own, each=True)
    count = gr.Slider(1, MOST_COMPARED, value=10, step=1, label="Images of each")
    button = gr.Button("Compare", variant="primary", elem_id="compare-button")
    compared = result("compare-result")

    def answer(one: Any, other: Any, label: Any, seed: Any, guidance: Any, count: Any) -> Iterator[str]:
        count = whole(count, "The number of images", 1, MOST_COMPARED)
        require(isinstance(one, str) and isinstance(other, str), "Choose two flows.")
        done = latest = ""
        for name in (one, other):
            for stage, images, names in _draw(flows[name], label, seed, guidance, count):
                latest = done + pictures.tiles(images, names, f"{name}: {stage}.")
                yield latest
            done = latest

    connect(button, answer, [one, other, *fields, count], compared)
