"""``flowback reproduce``: train and evaluate the rows of a table one after the other, and fill it in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flowback.cli import evaluate, train
from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.errors import InputError
from flowback.files import replacing, write_json
from flowback.presets import Preset, table
from flowback.provenance import environment

__all__ = ["Options", "run"]

COLUMNS = (
    *("nll", "top1_gradient", "top1_exhaustive", "fd_efficientnet_lite0"),
    *("fid", "sfid", "inception_score"),
)
"""Figures of a row, where the evaluation gives them."""


@dataclass(frozen=True)
class Options:
    """Reproduce a table, row by row; the same command skips what is done and goes on where it stopped.

    Each row is what `flowback train PRESET` and `flowback evaluate` make of it, under OUT/runs. The table is
    written anew after each row, to OUT/TABLE.json and OUT/TABLE.md.
    """

    table: tyro.conf.Positional[str]
    """`table1`, `latents`, `encoders`, `steps` or `tarflow`; `flowback presets` shows their rows."""
    mini: bool = False
    """The small siblings of the rows, on digits: two minutes each on two cores."""
    seeds: int = 1
    """Runs of each row, with seeds 0, 1, ..."""
    out: Path = Path("results")
    """Folder of the table and the runs."""
    data: Path | None = None
    """The prepared set, or the folder of images; the small siblings need none."""
    samples: int | None = None
    """Samples of each evaluation; None: 1,000 for the small siblings, else 4,096, as in the paper."""
    guidance: str | None = None
    """Guidance scale, or FIRST:LAST:STEP to search; None: 0.3 for the small siblings, else 0:4:0.5."""
    inception_weights: Path | None = None
    """Local file of the Inception weights: adds ADM's FID, sFID and IS."""
    steps: int | None = None
    """Training steps in place of the preset's, to try the command out."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""

    def check(self) -> None:
        """Raise InputError for what cannot work; not on construction, whose errors tyro frames."""
        if self.seeds < 1:
            raise InputError("--seeds must be at least 1.")
        if not self.mini and self.data is None:
            raise InputError(f"{self.table} needs its images: give --data, or --mini for the small siblings.")


def run(argv: list[str]) -> None:
    """Train, evaluate, tabulate."""
    options = parse(Options, argv, "reproduce")
    options.check()
    presets = table(options.table, options.mini)
    name = options.table + ("-mini" if options.mini else "")
    rows: dict[str, list[dict[str, Any]]] = {preset: [] for preset in presets}
    for preset in presets:
        for seed in range(options.seeds):
            folder = options.out / "runs" / name / f"{preset}-seed{seed}"
            say(f"{preset}, seed {seed}: {folder}")
            record = _done(folder, options)
            if record is None:
                train.run(_train_words(preset, folder, seed, options))
                evaluate.run(_evaluate_words(folder, seed, options))
                record = json.loads((folder / "result.json").read_text())
            rows[preset].append(record)
            summary = _summarise(name, presets, rows, options)
            write_json(options.out / f"{name}.json", summary)
            with replacing(options.out / f"{name}.md") as file:
                file.write(_markdown(summary))
    columns = summary["columns"]
    show_table(
        name,
        ["preset", *columns],
        [[row["preset"], *map(row["mean"].get, columns)] for row in summary["rows"]],
    )
    say(f"Written to {options.out / name}.json and .md")


def _done(folder: Path, options: Options) -> dict[str, Any] | None:
    """The record of a run that was evaluated as asked."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
        settings = record["settings"]
        steps = json.loads((folder / "config.json").read_text())["train"]["steps"]
    except (ValueError, KeyError, OSError):
        return None
    wanted = (
        _samples(options),
        "none" if options.inception_weights is None else "adm",
        options.steps or steps,
    )
    return record if (settings.get("samples"), settings.get("protocol"), steps) == wanted else None


def _samples(options: Options) -> int:
    return options.samples if options.samples is not None else 1000 if options.mini else 4096


def _train_words(preset: str, folder: Path, seed: int, options: Options) -> list[str]:
    words = [preset, "--out", str(folder), "--train.seed", str(seed), "--train.device", options.device]
    if options.data is not None:
        words += ["--data.path", str(options.data)]
    return words if options.steps is None else [*words, "--train.steps", str(options.steps)]


def _evaluate_words(folder: Path, seed: int, options: Options) -> list[str]:
    guidance = options.guidance or ("0.3" if options.mini else "0:4:0.5")
    words = [str(folder), "--samples", str(_samples(options)), "--guidance", guidance, "--seed", str(seed)]
    words += ["--json", str(folder / "result.json"), "--device", options.device]
    if options.inception_weights is not None:
        words += ["--protocol", "adm", "--inception-weights", str(options.inception_weights)]
    return words


def _summarise(
    name: str, presets: dict[str, Preset], rows: dict[str, list[dict[str, Any]]], options: Options
) -> dict[str, Any]:
    """Mean and spread over the seeds of each row that has been run."""
    found = []
    for preset, records in rows.items():
        if not records:
            continue
        own = [record["figures"] for record in records]
        columns = [column for column in COLUMNS if column in own[0]]
        values = {column: [float(figures[column]) for figures in own] for column in columns}
        found.append(
            {
                "preset": preset,
                "about": presets[preset].about,
                "published": presets[preset].published,
                "seeds": list(range(len(own))),
                "values": values,
                "mean": {column: sum(own) / len(own) for column, own in values.items()},
                "spread": {column: _spread(own) for column, own in values.items()},
                "device": records[0]["environment"]["device"],
                "commit": records[0]["environment"]["commit"],
            }
        )
    columns = [column for column in COLUMNS if column in found[0]["mean"]]
    settings = {"samples": _samples(options), "seeds": options.seeds, "steps": options.steps}
    return {
        "table": name,
        "columns": columns,
        "settings": settings,
        "environment": environment(),
        "rows": found,
    }


def _spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for one."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _markdown(summary: dict[str, Any]) -> str:
    columns, about = summary["columns"], summary["environment"]
    published = sorted({key for row in summary["rows"] for key in row["published"]})
    lines = [
        f"# {summary['table']}",
        "",
        "| preset | " + " | ".join([*columns, *(f"paper: {key}" for key in published)]) + " |",
        "|---|" + "---:|" * (len(columns) + len(published)),
    ]
    for row in summary["rows"]:
        own = [
            f"{row['mean'][column]:.4g}"
            + (f" ± {row['spread'][column]:.2g}" if row["spread"][column] is not None else "")
            for column in columns
        ]
        theirs = [f"{row['published'][key]:g}" if key in row["published"] else "–" for key in published]
        lines.append(f"| {row['preset']} | " + " | ".join([*own, *theirs]) + " |")
    seeds = summary["settings"]["seeds"]
    versions = about["versions"]
    lines += [
        "",
        f"- Seeds 0 to {seeds - 1}, mean ± standard deviation over them." if seeds > 1 else "- Seed 0.",
        "- nll: nats per dimension of noised test images given their labels; top1: share of the test images "
        "that the flow classifies without a trained classifier.",
        f"- fd_efficientnet_lite0: Fréchet distance of {summary['settings']['samples']} samples to the "
        "training images in EfficientNet-Lite0's features; not an FID.",
        f"- {about['device']}; torch {versions['torch']}; commit {about['commit'] or 'unknown'}; "
        f"command `{about['command']}`.",
        "",
    ]
    return "\n".join(lines)
