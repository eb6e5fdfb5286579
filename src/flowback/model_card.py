"""The page that tells what a published flow is: README.md of its folder and of its repository on the Hub.

Nothing in it is written by hand: it says what the settings and an evaluation record say, and no path of the
machine that the flow was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowback.checked import from_dict, to_dict
from flowback.config import RunConfig
from flowback.errors import InputError
from flowback.flow.cost import parameters
from flowback.reading import read_json

__all__ = ["Card", "about", "card_text", "public", "public_config", "read_record"]

_DATA = {
    "fashion-mnist": ("Fashion-MNIST (arXiv 1708.07747)", "MIT"),
    "mnist": ("MNIST", None),
    "kmnist": ("KMNIST (arXiv 1812.01718)", "CC BY-SA 4.0"),
    "emnist": ("EMNIST, balanced (arXiv 1702.05373)", None),
    "cifar10": ("CIFAR-10", None),
    "cifar100": ("CIFAR-100", None),
    "digits": ("scikit-learn's digits", "CC BY 4.0"),
}
"""Data sets by name: their title, and the licence that they come under, where there is one."""
_FIGURES = {
    "nll": "nll of the noised test images (nats/dim)",
    "bits_per_dim": "bits per dimension of the 8-bit test images, an upper bound",
    "top1_gradient": "top-1 accuracy, gradient rule",
    "top1_normalised": "top-1 accuracy, normalised rule",
    "top1_exhaustive": "top-1 accuracy, exhaustive rule",
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "fd_efficientnet_lite0": "Fréchet distance in EfficientNet-Lite0's features; not an FID",
}
_CITATION = """\
@inproceedings{zhai2025normalizing,
  title     = {Normalizing Flows are Capable Generative Models},
  author    = {Zhai, Shuangfei and Zhang, Ruixiang and Nakkiran, Preetum and Berthelot, David and
               Gu, Jiatao and Zheng, Huangjie and Chen, Tianrong and Bautista, Miguel Angel and
               Jaitly, Navdeep and Susskind, Josh},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  note      = {arXiv:2412.06329},
}
"""
_CITATION_REVERSE = """\
@inproceedings{chen2026flowing,
  title     = {Flowing Backwards: Improving Normalizing Flows via Reverse Representation Alignment},
  author    = {Chen, Yang and Xu, Xiaowei and Wang, Shuai and Zhu, Chenhui and Wen, Ruxue and Li, Xubin and
               Ge, Tiezheng and Wang, Limin},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2026},
  note      = {arXiv:2511.22345},
}
"""


@dataclass(frozen=True)
class Card:
    """What the card of a flow says beside its settings."""

    name: str
    """The flow's name: ``owner/name`` on the Hub, or that of its folder."""
    record: Path | str | None = None
    """Evaluation record: JSON of `flowback evaluate`, or of a row of `flowback reproduce`."""
    licence: str | None = None
    """Licence of the weights, by its SPDX name in small letters; None says that there is none yet."""
    guidance: float = 0.0
    """Guidance of the picture."""
    columns: int = 8
    """Images of each class in the picture; 0 leaves it out."""


def about(config: RunConfig) -> str:
    """What a flow is, in one sentence: size, images, data and training.

    Example:
        >>> from flowback import get_preset
        >>> about(get_preset("fashion").config)  # doctest: +NORMALIZE_WHITESPACE
        'A TARFlow of 0.4 M parameters for images of 28x28x1 in 10 classes, trained on 20,000 images of
        Fashion-MNIST for 2,000 steps of 32 images: likelihood alone.'
    """
    model, data, train = config.model, config.data, config.train
    classes = f" in {model.num_classes} classes" if model.num_classes else ", unconditional"
    size = f"{model.image_size}x{model.image_size}x{model.channels}"
    what = "latents" if config.codec.vae else "images"
    count = parameters(model)
    weights = f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"
    text = f"A TARFlow of {weights} parameters for {what} of {size}{classes}"
    if data.name == "none":
        return text + "; its data are not recorded."
    source = _data_name(config)
    some = f"{data.limit:,} images of " if data.limit else ""
    return (
        f"{text}, trained on {some}{source} for {train.steps:,} steps of {train.batch_size} images: "
        f"{_alignment(config)}."
    )


def _data_name(config: RunConfig) -> str:
    data = config.data
    if data.name in _DATA:
        return _DATA[data.name][0].split(" (")[0]
    return f"a folder called {data.folder.name}" if data.folder else data.name


def _alignment(config: RunConfig) -> str:
    alignment = config.alignment
    if not alignment.active:
        return "likelihood alone"
    order = f" of order {alignment.order}" if alignment.strategy == "reverse" else ""
    if alignment.strategy == "reverse" and alignment.order == "exact":
        order = ", exact"
    places = ", ".join(f"({block}, {layer})" for block, layer in alignment.locations)
    return (
        f"likelihood and {alignment.strategy} alignment{order}, with {alignment.encoder} at (block, layer) "
        f"{places}, weight {alignment.weight:g}"
    )


def read_record(file: Path | str) -> dict[str, Any]:
    """An evaluation record, also the one inside a record of `flowback reproduce`.

    Raises:
        InputError: no such file, or something else.
    """
    try:
        record = read_json(Path(file))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError:
        record = {}
    record = record.get("report", record)
    parts = ("figures", "settings", "environment")
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in parts):
        raise InputError(f"{file} is no evaluation record; give the JSON of `flowback evaluate --json`.")
    return record


def public(data: Any) -> Any:
    """JSON data with the last part alone of every absolute path, also inside sentences.

    Example:
        >>> public({"command": "flowback evaluate /home/me/runs/a", "limit": 5})
        {'command': 'flowback evaluate a', 'limit': 5}
    """
    if isinstance(data, dict):
        return {key: public(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [public(value) for value in data]
    if isinstance(data, str):
        return " ".join(Path(word).name if Path(word).is_absolute() else word for word in data.split(" "))
    return data


def public_config(config: RunConfig) -> RunConfig:
    """The settings without paths of this machine; names of classes stay as they are."""
    values = to_dict(config)
    return from_dict(RunConfig, {**public(values), "classes": values["classes"]})


def card_text(
    card: Card, config: RunConfig, record: Mapping[str, Any] | None, picture: bool, rounded: bool = False
) -> str:
    """README.md of a flow's folder.

    Args:
        card: what to say beside the settings.
        config: the flow's settings.
        record: the evaluation record, as :func:`read_record` gives it.
        picture: whether samples.png lies beside it.
        rounded: whether the record is of the weights before they were rounded to fp16.
    """
    parts = [
        _header(card, config),
        f"# {card.name}\n\n{about(config)}\n",
        *([_picture(card, config)] if picture else []),
        _usage(card, config),
        _settings(config),
        _figures(record, rounded),
        _limits(record),
        _licence(card, config),
        _cite(config),
    ]
    return "\n".join(parts)


def _header(card: Card, config: RunConfig) -> str:
    """Front matter, which the Hub reads."""
    aligned = config.alignment.active
    tags = ["normalizing-flow", "tarflow", *(["representation-alignment"] if aligned else [])]
    lines = [
        "library_name: flowback",
        f"license: {card.licence or 'unknown'}",
        "pipeline_tag: unconditional-image-generation",
        f"tags: [{', '.join(tags)}]",
    ]
    return "\n".join(["---", *lines, "---", ""])


def _picture(card: Card, config: RunConfig) -> str:
    rows = "one class in each row, " if config.model.num_classes else ""
    return (
        f"![Samples](samples.png)\n\nSamples as they came, {rows}"
        f"seeds from 0 on, guidance {card.guidance:g}, denoised where the flow allows it.\n"
    )


def _usage(card: Card, config: RunConfig) -> str:
    labels = "labels=[0, 1], " if config.model.num_classes else ""
    return (
        "## Use\n\n```sh\npip install flowback-nf\n"
        f"flowback sample {card.name} --count 64\n```\n\n```python\nimport flowback\n\n"
        f'flow = flowback.Flow.from_pretrained("{card.name}")\n'
        f"images = flow.sample({labels}seeds=[0, 1])  # (2, C, H, W) on [-1, 1]\n```\n"
    )


def _settings(config: RunConfig) -> str:
    model, data, train = config.model, config.data, config.train
    deviations = {
        "gaussian": f", standard deviation {model.noise_std:g}",
        "range": f", standard deviations from {model.noise_min:g} to {model.noise_max:g}",
    }
    noise = model.noise + deviations.get(model.noise, "")
    rows = [
        ("blocks, layers, width", f"{model.blocks}, {model.layers}, {model.width}"),
        ("patches", f"{model.patch_size}x{model.patch_size}, {model.tokens} tokens"),
        ("noise on the images, on the scale of [-1, 1]", noise),
    ]
    if data.name != "none":
        title = _DATA.get(data.name, (_data_name(config), None))[0]
        rows += [
            ("data", f"{title}, {data.limit:,} training images" if data.limit else title),
            ("mirrored", "half of the training images" if data.flip else "no"),
            (
                "training",
                f"{train.steps:,} steps of {train.batch_size} images, AdamW, learning rate {train.lr:g}",
            ),
            ("objective", _alignment(config)),
            ("weights", f"moving average, decay {train.ema_decay:g}; seed {train.seed}; {train.precision}"),
        ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return f"## Settings\n\n| setting | value |\n|---|---|\n{table}\nAll of them are in `config.json`.\n"


def _figures(record: Mapping[str, Any] | None, rounded: bool) -> str:
    if record is None:
        return "## Figures\n\nNot measured. `flowback evaluate` does it.\n"
    figures, settings, around = record["figures"], record["settings"], record["environment"]
    lines = ["## Figures", "", "| figure | value |", "|---|---:|"]
    for name, title in _FIGURES.items():
        if isinstance(figures.get(name), float):
            value = f"{100 * figures[name]:.1f} %" if name.startswith("top1") else f"{figures[name]:.4g}"
            error = figures.get(f"{name}_error")
            lines.append(f"| {title} | {value}{f' ± {error:.2g}' if isinstance(error, float) else ''} |")
    held_out, samples = settings.get("held_out"), settings.get("samples")
    lines += ["", "± is the standard error over the test images. Conditions:", ""]
    if isinstance(held_out, dict):
        count = held_out.get("limit")
        which = f"{count:,} images" if count else "all images"
        lines.append(
            f"- test: {which} of {held_out.get('images')}, {held_out.get('draws')} draws of the noise"
        )
    if samples:
        drawn = f"- samples: {samples:,}, guidance {settings.get('guidance')}, {settings.get('sampler')}"
        images, reference = settings.get("reference_images"), settings.get("reference")
        lines.append(f"{drawn}, against {images:,} images of {reference}" if images else drawn)
    versions = around.get("versions") or {}
    lines.append(
        f"- measured on {around.get('device')}; torch {versions.get('torch')}; commit {around.get('commit')}"
    )
    if rounded:
        lines.append("- measured before the weights were rounded to fp16, as they are stored here")
    lines += [f"- {warning}" for warning in record.get("warnings") or []]
    return "\n".join([*lines, "", "The whole record is `evaluation.json`.", ""])


def _limits(record: Mapping[str, Any] | None) -> str:
    lines = [
        "## Limits",
        "",
        "- It models the images of its training data and no others; likelihoods of other images say little.",
        "- It models images with noise on them, which `flow.add_noise` adds, not clean ones.",
        "- Nobody has looked for people, bias or copies in what it draws.",
    ]
    if record is None:
        lines.append("- Its quality has not been measured.")
    return "\n".join([*lines, ""])


def _licence(card: Card, config: RunConfig) -> str:
    weights = card.licence or "not stated; ask the author"
    lines = ["## Licence", "", f"- weights: {weights}"]
    if config.data.name in _DATA:
        title, licence = _DATA[config.data.name]
        lines.append(f"- data: {title}: {licence or 'see its source'}")
    if config.alignment.active:
        lines.append(
            f"- encoder: {config.alignment.encoder}: its weights are not part of this; see its source"
        )
    return "\n".join([*lines, ""])


def _cite(config: RunConfig) -> str:
    text = _CITATION + ("\n" + _CITATION_REVERSE if config.alignment.active else "")
    return f"## Citation\n\n```bibtex\n{text}```\n"
