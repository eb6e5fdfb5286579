"""A table that was filled in: rows, their statistics over seeds, and paired differences between rows.

Means and standard deviations (n - 1 in the denominator) are over seeds. Two rows are compared seed by seed:
both runs of a pair see the same images in the same order, so much of the spread between seeds falls out of
their difference. Its interval is Student's t on these differences,

    mean(d) ± t(0.975; n - 1) · std(d) / √n ,

which takes them for independent and nearly normal. With two or three seeds it is wide, and honestly so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowback.files import replacing, write_json

__all__ = ["CONFIDENCE", "Difference", "Row", "Table", "images_needed", "paired_difference"]

CONFIDENCE = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Difference:
    """One row minus another, by seed."""

    values: list[float]
    """For each seed that both rows have."""
    mean: float
    low: float | None
    """Ends of the interval of 95 %; None for a single seed."""
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """Mean and interval of the values."""
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(list(values), mean, None, None)
        from scipy.stats import t  # slow to import, and a table of one seed does without

        count = len(values)
        half = t.ppf((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
        return cls(list(values), mean, float(mean - half), float(mean + half))


@dataclass(frozen=True)
class Row:
    """A preset's figures over seeds."""

    preset: str
    about: str
    seeds: list[int]
    """Seeds that gave figures; the values stand in their order."""
    values: dict[str, list[float]]
    mean: dict[str, float]
    std: dict[str, float | None]
    """Standard deviation over seeds; None for one."""
    published: dict[str, float]
    """The paper's figures; `top1` in per cent."""
    baseline: str | None = None
    """The row that this one is compared with."""
    difference: dict[str, Difference] = field(default_factory=dict)
    """This row minus its baseline, for each figure."""
    sooner: dict[str, Difference] = field(default_factory=dict)
    """How many times fewer images than its baseline the row needs until it first reaches the baseline's last
    value."""
    failures: dict[int, str] = field(default_factory=dict)
    """What stopped a run, by seed."""
    records: list[str] = field(default_factory=list)
    """Files of the full records, by seed."""
    curves: dict[str, list[list[dict[str, float]]]] = field(default_factory=dict, repr=False)
    """Figures along the run (`training`), by guidance scale, or by location: points for each seed."""
    commits: list[str | None] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """The rows of a table at a scale, as far as they were run."""

    name: str
    title: str
    scale: str
    columns: list[str]
    """Figures, in the order in which they are shown."""
    rows: list[Row]
    settings: dict[str, Any]
    warnings: list[str]
    notes: list[str]
    """Sentences under the table: what it supports and what not."""
    environment: dict[str, Any]

    @property
    def file_name(self) -> str:
        """Of the files, without their endings: `table1`, or `table1-mini`."""
        return self.name if self.scale == "paper" else f"{self.name}-{self.scale}"

    def row(self, preset: str) -> Row:
        """The row of a preset."""
        return next(row for row in self.rows if row.preset == preset)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"table": self.file_name, **{k: v for k, v in asdict(self).items() if k != "name"}}

    def save(self, folder: Path) -> None:
        """Write FOLDER/NAME.json and NAME.md, each in one piece."""
        write_json(folder / f"{self.file_name}.json", self.to_dict())
        with replacing(folder / f"{self.file_name}.md") as file:
            file.write(self.to_markdown())

    def to_markdown(self) -> str:
        """The table, the differences, and what a reader must know."""
        published = list(dict.fromkeys(name for row in self.rows for name in row.published))
        lines = [f"# {self.file_name}: {self.title}", ""]
        lines += _grid(
            ["preset", *self.columns, *(f"paper: {name}" for name in published)],
            [
                [
                    row.preset,
                    *(_value(row, column) for column in self.columns),
                    *(f"{row.published[name]:g}" if name in row.published else "–" for name in published),
                ]
                for row in self.rows
            ],
        )
        compared = [row for row in self.rows if row.difference]
        if compared:
            lines += ["", f"Differences, by seed, with an interval of {CONFIDENCE:.0%} (Student's t):", ""]
            lines += _grid(
                ["row − baseline", *self.columns],
                [
                    [
                        f"{row.preset} − {row.baseline}",
                        *(_interval(row.difference.get(column)) for column in self.columns),
                    ]
                    for row in compared
                ],
            )
        sooner = [row for row in self.rows if row.sooner]
        if sooner:
            names = list(dict.fromkeys(name for row in sooner for name in row.sooner))
            lines += [
                "",
                "Images that the baseline needs until its last value, over those that the row needs:",
                "",
            ]
            lines += _grid(
                ["row", *names],
                [
                    [row.preset, *(_interval(row.sooner.get(name), sign="") for name in names)]
                    for row in sooner
                ],
            )
        lines += ["", *(f"- {sentence}" for sentence in [*self.notes, *self._about()]), ""]
        return "\n".join(lines)

    def _about(self) -> list[str]:
        """What every reader of the figures must know."""
        seeds = self.settings.get("seeds", [])
        told = []
        if seeds:
            few = "one run a row, no standard deviation: differences say little" if len(seeds) < 2 else ""
            listed = ", ".join(map(str, seeds))
            told.append(f"Seeds {listed}: {few or 'mean ± standard deviation over them'}.")
            told += [
                f"{row.preset} has figures of seed {', '.join(map(str, row.seeds))} alone."
                for row in self.rows
                if row.seeds and len(row.seeds) < len(seeds)
            ]
        if "nll" in self.columns:
            told.append("nll: nats per dimension of noised test images given their labels.")
        if "top1_gradient" in self.columns:
            told.append(
                "top1: share of the test images that the flow classifies, without a trained classifier."
            )
        if "fd_efficientnet_lite0" in self.columns:
            told.append(
                f"fd_efficientnet_lite0: Fréchet distance of {self.settings['samples']} samples to the "
                "training images in EfficientNet-Lite0's features; not an FID."
            )
        told += [
            f"{row.preset}, seed {seed}, failed: {why}"
            for row in self.rows
            for seed, why in row.failures.items()
        ]
        versions = self.environment["versions"]
        return [
            *told,
            *self.warnings,
            f"{self.environment['device']}; torch {versions['torch']}; "
            f"commit {self.environment['commit'] or 'unknown'}; command `{self.environment['command']}`.",
        ]


def paired_difference(row: Row, baseline: Row, figure: str) -> Difference | None:
    """``row`` minus ``baseline`` over the seeds that both have; None without any.

    Two rows of a table that is filled in compare like this, whatever its baseline.
    """
    if figure not in row.values or figure not in baseline.values:
        return None
    theirs = dict(zip(baseline.seeds, baseline.values[figure], strict=True))
    pairs = zip(row.seeds, row.values[figure], strict=True)
    differences = [value - theirs[seed] for seed, value in pairs if seed in theirs]
    return Difference.of(differences) if differences else None


def images_needed(
    curve: Sequence[Mapping[str, float]], figure: str, level: float, higher: bool
) -> float | None:
    """Images after which ``figure`` first reaches ``level``, by straight lines between the evaluations.

    None where it never does.

    Example:
        >>> curve = [{"images": 100.0, "test_nll": 0.4}, {"images": 200.0, "test_nll": 0.2}]
        >>> images_needed(curve, "test_nll", 0.3, higher=False)
        150.0
    """
    sign = 1 if higher else -1
    before: Mapping[str, float] | None = None
    for point in curve:
        if figure not in point:
            continue
        if sign * (point[figure] - level) >= 0:
            if before is None:
                return float(point["images"])
            share = (level - before[figure]) / (point[figure] - before[figure])
            return float(before["images"] + share * (point["images"] - before["images"]))
        before = point
    return None


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _value(row: Row, column: str) -> str:
    if column not in row.mean:
        return "failed" if row.failures and not row.seeds else "–"
    std = row.std[column]
    return f"{row.mean[column]:.4g}" + ("" if std is None else f" ± {std:.2g}")


def _interval(difference: Difference | None, sign: str = "+") -> str:
    if difference is None:
        return "–"
    text = f"{difference.mean:{sign}.3g}"
    return (
        text
        if difference.low is None
        else f"{text} [{difference.low:{sign}.3g}, {difference.high:{sign}.3g}]"
    )
