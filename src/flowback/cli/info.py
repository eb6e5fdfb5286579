"""``flowback info``: what a run or a checkpoint is, or what this machine has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flowback.checked import to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.config import RunConfig
from flowback.files import write_json

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Show what a run or a checkpoint is; without one, what flowback finds on this machine.

    Of a run: its size, classes, last figures, and the settings that are not the defaults.
    """

    checkpoint: tyro.conf.Positional[str | None] = None
    """A run's folder, a checkpoint, or a name on the Hub."""
    json: Path | None = None
    """Also write it to this file, with all settings."""


def run(argv: list[str]) -> None:
    """Collect, show, write."""
    options = parse(Options, argv, "info")
    if options.checkpoint is None:
        from flowback.devices import describe

        found = describe()
        show_table("This machine", ["", "found"], [[name, _text(value)] for name, value in found.items()])
    else:
        found = _of(options.checkpoint)
        _show(found)
    if options.json is not None:
        write_json(options.json, found)


def _of(name: str) -> dict[str, Any]:
    """What is known of a checkpoint and of the run that it belongs to."""
    from flowback import checkpoint

    fetched = checkpoint.fetch(name)
    folder = checkpoint.resolve(fetched)
    config = checkpoint.load_config(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {
        "checkpoint": str(folder),
        "parameters": _parameters(config),
        "files": {file.name: file.stat().st_size for file in files},
        "classes": list(config.classes),
        "figures": _figures(fetched),
        "settings": to_dict(config),
    }


def _parameters(config: RunConfig) -> int:
    """Number of weights of the flow, or of the student."""
    from accelerate import init_empty_weights

    from flowback.flow.cost import parameters
    from flowback.model import Student

    if not config.student.active:
        return parameters(config.model)
    with init_empty_weights():
        student = Student(config.model, config.student)
    return sum(p.numel() for p in student.parameters())


def _figures(run_folder: Path) -> dict[str, Any]:
    """The last figures of the run: of its training, and on the test images; none for a lone checkpoint."""
    from flowback.training.run_folder import read_rows

    figures: dict[str, Any] = {}
    for row in read_rows(run_folder / "metrics.jsonl"):
        shown = ("step", "images", "seconds", "nll", "loss", "alignment", "test_", "fd_")
        figures |= {key: value for key, value in row.items() if key.startswith(shown)}
    return figures


def _show(found: dict[str, Any]) -> None:
    model = found["settings"]["model"]
    size = sum(found["files"].values())
    say(f"{found['checkpoint']}: {len(found['files'])} files, {size / 1e6:.3g} MB")
    say(
        f"Images of {model['image_size']}x{model['image_size']}x{model['channels']}; "
        f"{found['parameters']:,} parameters in {_places(found['settings'])}."
    )
    classes = found["classes"]
    if classes:
        show_table("Classes", ["id", "name"], list(enumerate(classes)))
    else:
        say(f"{model['num_classes'] or 'No'} classes, without names.")
    if found["figures"]:
        show_table("Last figures of the run", ["figure", "value"], list(found["figures"].items()))
    defaults = to_dict(RunConfig())
    rows = [
        [f"--{section}.{name.replace('_', '-')}", _text(value)]
        for section, values in found["settings"].items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != defaults[section][name]
    ]
    show_table("Settings that are not the defaults", ["option", "value"], rows)


def _places(settings: dict[str, Any]) -> str:
    blocks, student = settings["model"]["blocks"], settings["student"]
    if student["method"] == "none":
        return f"{blocks} blocks"
    return f"{blocks + 1} stages, a student of {student['teacher']}"


def _text(value: Any) -> str:
    """As people read it: lists and tables without their brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {'none' if item is None else item}" for name, item in value.items())
    return json.dumps(value) if isinstance(value, (list, tuple)) else str(value)
