"""Fill in a table: train and evaluate its rows, and rewrite it after each.

OUT/runs/PRESET-seedN         a run, shared by all tables that have its row, and settings.json
OUT/TABLE/PRESET-seedN.json   the full record of its evaluation, and all that decided the figures
OUT/TABLE/PRESET-seedN.log    what a row said that ran beside others
OUT/TABLE.{json,md,svg}       the table

A run or a record counts as done only if everything that decides its figures is what is asked for now: all
settings of the run, the source code, the images, the evaluation, the sampling. A run of other settings is
refused, with what differs; a record of another evaluation is made again from the run.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from flowback.checked import require, to_dict
from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.data.load import load_images
from flowback.devices import pick_device
from flowback.errors import InputError, nearest
from flowback.files import file_hash
from flowback.folder_lock import folder_lock
from flowback.presets import PRESETS, TABLES, Preset
from flowback.provenance import code_hash, environment
from flowback.tables.charts import draw
from flowback.tables.done import FORMAT, deciding, differences, read
from flowback.tables.result import Row, Table
from flowback.tables.row_run import RowRun, run_rows
from flowback.tables.summary import COLUMNS, DISTANCES, compared, mixed, summarise
from flowback.task_config import EvaluateConfig, ReproduceConfig, SampleConfig, Scale

__all__ = ["reproduce", "rows_of"]

log = logging.getLogger("flowback")

TESTED = 5000
"""Test images of an evaluation at small scales, at most."""


def rows_of(table: str, scale: str = "paper") -> dict[str, Preset]:
    """The presets of a table's rows, in order.

    Raises:
        InputError: there is no such table or scale, or the table has no rows at that scale.

    Example:
        >>> list(rows_of("table7", "mini"))[0]
        'imagenet64-detach-all-2-mini'
    """
    if table not in TABLES:
        raise InputError(f"There is no table {table!r}; {nearest(table, TABLES)}")
    if scale not in get_args(Scale):
        raise InputError(f"--scale {scale} is not one of {', '.join(get_args(Scale))}.")
    paper = TABLES[table]
    if scale == "paper" or paper.kind == "shown":
        names: tuple[str, ...] = paper.presets
    elif scale == "fashion":
        names = paper.fashion
    else:
        names = tuple(f"{name}-mini" for name in paper.presets)
        if any(name not in PRESETS for name in names):
            raise InputError(f"The rows of {table} differ in their encoder alone and have no small siblings.")
    if not names:
        raise InputError(f"{table} has no rows on Fashion-MNIST; take --scale mini, or paper.")
    return {name: PRESETS[name] for name in names}


def reproduce(
    table: str,
    scale: str = "paper",
    seeds: int | Sequence[int] = 1,
    out: Path | str = "results",
    config: ReproduceConfig | None = None,
    sampling: SampleConfig | None = None,
    **options: Any,
) -> Table:
    """Train and evaluate the rows of a table; rows that are done already are skipped.

    Args:
        table: `table1` to `table9`, `figure4`, `figure5` of arXiv 2511.22345, or `tarflow`.
        scale: `paper`, its own size; `mini`, small siblings on digits; or `fashion`, on Fashion-MNIST.
        seeds: of the runs, or how many from 0 on.
        out: folder of tables and runs.
        config: all other options.
        sampling: how samples are drawn; the guidance is that of ``config``.
        options: fields of :class:`ReproduceConfig` that replace those of ``config``.

    Returns:
        The table, which is in ``out`` too. A failed run is listed there and does not stop the others.

    Raises:
        InputError: no such table, missing images, a run with other settings in ``out``, or all runs failed.
        Interrupted: a signal came; the same call continues.
    """
    config = replace(config or ReproduceConfig(), **options)
    pick_device(config.device, "--device")  # else each row would fail by it
    job = _Job(table, scale, seeds, Path(out), config, sampling or SampleConfig())
    if job.paper.kind == "shown":
        shown = job.shown()
        shown.save(job.out)
        return shown
    wanted = list(job.wanted())
    if not wanted:
        raise InputError(f"No row of {job.name} can be run: {job.first_failure}")
    filled: Table | None = None
    with folder_lock(job.out, active=os.environ.get("RANK", "0") == "0"):
        for row in wanted:  # before hours are spent
            job.refuse_other_runs(row)
        left = [row for row in wanted if not job.is_done(row)]
        for row, outcome in run_rows(left, job.config.jobs):
            filled = job.take(row, outcome)
    if not job.records:
        raise InputError(f"No row of {job.name} could be run: {job.first_failure}")
    return filled or job.save()


def _chosen(presets: dict[str, Preset], config: ReproduceConfig) -> dict[str, Preset]:
    """The rows that are asked for."""
    for pattern in config.rows:
        if not any(fnmatchcase(name, pattern) for name in presets):
            raise InputError(f"--rows {pattern} matches no row of the table; {nearest(pattern, presets)}")
    patterns = config.rows or ("*",)
    chosen = {n: preset for n, preset in presets.items() if any(fnmatchcase(n, p) for p in patterns)}
    if config.baseline is not None and config.baseline not in chosen:
        raise InputError(
            f"--baseline {config.baseline} is not one of the rows; {nearest(config.baseline, chosen)}"
        )
    return chosen


class _Job:
    """A table being filled in."""

    def __init__(
        self,
        table: str,
        scale: str,
        seeds: int | Sequence[int],
        out: Path,
        config: ReproduceConfig,
        sampling: SampleConfig,
    ) -> None:
        self.presets, self.paper = _chosen(rows_of(table, scale), config), TABLES[table]
        self.out, self.config, self.sampling = out, config, sampling
        self.scale, self.seeds = scale, list(range(seeds)) if isinstance(seeds, int) else list(seeds)
        self.table_name, self.small = table, scale != "paper"
        require(len(self.seeds) > 0, "--seeds must be at least 1.")
        require(
            len(set(self.seeds)) == len(self.seeds), f"--seeds repeats a seed: {self.seeds}; give each once."
        )
        if not self.small and config.data is None and config.latents is None and self.paper.kind != "shown":
            raise InputError(
                f"{table} needs its images: give --data, or --scale mini or fashion for small rows."
            )
        self.records: dict[tuple[str, int], tuple[Path, dict[str, Any]]] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.warnings: list[str] = []
        self.images = functools.cache(load_images)

    @property
    def name(self) -> str:
        """Of the table's files."""
        return f"{self.table_name}-{self.scale}" if self.small else self.table_name

    @property
    def first_failure(self) -> str:
        """Where there is nothing else to tell."""
        return next(iter(self.failures.values()))

    @property
    def samples(self) -> int:
        """Of each evaluation."""
        return self.config.samples or (1000 if self.small else self.paper.samples)

    def wanted(self) -> Iterator[RowRun]:
        """Every row at every seed, row by row, but for those whose images are not there."""
        for name, preset in self.presets.items():
            for seed in self.seeds:
                try:
                    config = self._run_config(preset.config, seed)
                    images, test = self._images(config)
                except InputError as error:
                    self.failures[name, seed] = str(error)
                    continue
                run = {
                    "format": FORMAT,
                    "code": code_hash(),
                    "config": deciding(config),
                    "images": images.fingerprint,
                    "test": test.fingerprint,
                }
                settings = {"run": run, "evaluation": self._evaluation(config)}
                label = f"{name}-seed{seed}"
                folder, file = self.out / "runs" / label, self.out / self.name / f"{label}.json"
                yield RowRun(name, seed, config, settings, folder, file)

    def _run_config(self, config: RunConfig, seed: int) -> RunConfig:
        latent = config.codec.vae is not None
        path = self.config.latents if latent else self.config.data
        if path is None and not self.small:
            given = "latents" if latent else "images"
            raise InputError(f"This row needs its {given}: give --{'latents' if latent else 'data'}.")
        data = config.data if path is None else replace(config.data, path=path)
        steps = self.config.steps or config.train.steps
        train = replace(config.train, steps=steps, seed=seed, device=self.config.device)
        return replace(config, data=data, train=train)

    def _images(self, config: RunConfig) -> tuple[ImageSet, ImageSet]:
        size, channels = config.model.image_size, config.model.channels
        train, test = (self.images(config.data, size, channels, split) for split in ("train", "test"))
        return train, test

    def _evaluation(self, config: RunConfig) -> dict[str, Any]:
        seed = config.train.seed
        if self.paper.kind == "probe":
            return {"kind": "probe", "seed": seed}
        weights = self.config.inception_weights
        if weights is not None and not weights.is_file():
            raise InputError(f"--inception-weights {weights} does not exist.")
        guidance, search = self.config.guidance, self.config.search
        if guidance is None and not search:
            guidance, search = self._usual_guidance()
        if config.model.num_classes == 0 and self.sampling.attention_temperature == 1:
            guidance, search = 0.0, ()  # nothing to guide towards
        return {
            "kind": "quality",
            "inception": weights and file_hash(weights),
            "options": to_dict(
                EvaluateConfig(
                    samples=self.samples,
                    limit=TESTED if self.small else None,
                    search=tuple(search),
                    protocol="none" if weights is None else "adm",
                    inception_weights=weights,
                    reference_limit=None,
                    seed=seed,
                )
            ),
            "sampling": to_dict(replace(self.sampling, guidance=guidance or 0.0)),
        }

    def _usual_guidance(self) -> tuple[float, tuple[float, ...]]:
        """The scale, or the scales that are searched."""
        about_guidance = len(self.paper.search) > 0
        if self.small:
            return (0.0, (0.0, 0.5, 1.0, 1.5, 2.0)) if about_guidance else (0.3, ())
        return 0.0, self.paper.search or tuple(step / 2 for step in range(9))

    def refuse_other_runs(self, row: RowRun) -> None:
        """Raise InputError if the folder holds a run of other settings; with `redo`, remove it."""
        folder = row.folder
        if not folder.exists():
            return
        stored = read(folder / "settings.json")
        if stored is None and not self.config.redo:
            raise InputError(
                f"{folder} was not made by this command, or its settings.json is damaged; "
                "give another --out, or --redo to train it again."
            )
        different = (
            ["all of it"]
            if stored is None
            else differences(stored, row.settings["run"], self.config.any_code)
        )
        if different and not self.config.redo:
            raise InputError(
                f"{folder} holds a run of other settings: {'; '.join(different)}. "
                f"Give another --out, or --redo to train it again{self._or_any_code(different)}."
            )
        if different:
            log.warning("%s is removed and trained again: %s.", folder, "; ".join(different))
            shutil.rmtree(folder)

    def _or_any_code(self, different: list[str]) -> str:
        """What else helps where the code alone is another."""
        code_alone = all(each.startswith("code was") for each in different)
        return ", or --any-code to take it as it is" if code_alone else ""

    def is_done(self, row: RowRun) -> bool:
        """Whether the row's record is that of what is asked for; it is then part of the table."""
        stored = read(row.file)
        if stored is None:
            return False
        different = differences(stored.get("settings", {}), row.settings, self.config.any_code)
        if different:
            log.info("%s is evaluated again: %s.", row.file, "; ".join(different))
            return False
        self._keep((row.preset, row.seed), row.file, stored)
        return True

    def take(self, row: RowRun, outcome: dict[str, Any] | str) -> Table:
        """Put a record into the table, or what stopped the row, and write the table."""
        key = (row.preset, row.seed)
        if isinstance(outcome, str):
            self.failures[key] = outcome
            log.warning("%s, seed %d failed: %s", row.preset, row.seed, outcome)
        else:
            self._keep(key, row.file, outcome)
        return self.save()

    def save(self) -> Table:
        """Write the table and its pictures as far as they go."""
        filled = self.table()
        filled.save(self.out)
        draw(filled, self.out)
        return filled

    def _keep(self, key: tuple[str, int], file: Path, record: dict[str, Any]) -> None:
        """Take a record's figures into the table; those of a flow that diverged are a failure."""
        figures = record["report"]["figures"]
        if figures.get("nll", 0.0) is None:
            self.failures[key] = f"its nll is not finite (see {file})"
            return
        self.records[key] = (file, record)
        lost = [name for name in DISTANCES if figures.get(name, 0.0) is None]
        if lost:
            self.warnings.append(f"{key[0]}, seed {key[1]}: {', '.join(lost)} is not finite (see {file}).")

    def table(self) -> Table:
        """The rows that have been run, or have failed."""
        rows = []
        for name, preset in self.presets.items():
            records = {seed: self.records[name, seed] for seed in self.seeds if (name, seed) in self.records}
            failures = {seed: why for (row, seed), why in self.failures.items() if row == name}
            if records or failures:
                rows.append(summarise(name, preset, self.paper.figures_of(name), records, failures))
        aligned = {name: preset.config.alignment.active for name, preset in self.presets.items()}
        rows = compared(rows, aligned, self.config.baseline)
        columns = [column for column in COLUMNS if any(column in row.mean for row in rows)]
        settings = {
            k: v for k, v in to_dict(self.config).items() if k not in {"note", "redo", "jobs", "any_code"}
        }
        settings |= {"samples": self.samples, "seeds": self.seeds, "sampling": to_dict(self.sampling)}
        return self._table(columns, rows, settings, [*mixed(rows), *self.warnings])

    def _table(
        self, columns: list[str], rows: list[Row], settings: dict[str, Any], warnings: list[str]
    ) -> Table:
        notes = [note for note in (*self.config.note, self.paper.note) if note]
        scale = "paper" if self.paper.kind == "shown" else self.scale
        instead = {"mini": "small flows on digits, for: ", "fashion": "small flows on Fashion-MNIST, for: "}
        return Table(
            name=self.table_name,
            title=instead.get(scale, "") + self.paper.title,
            scale=scale,
            columns=columns,
            rows=rows,
            settings=settings,
            warnings=warnings,
            notes=notes,
            environment=environment(),
        )

    def shown(self) -> Table:
        """A table that nothing is run for: the paper's figures, beside the presets' own settings."""
        rows = []
        for name, preset in self.presets.items():
            known = {**to_dict(preset.config.train), "weight": preset.config.alignment.weight}
            mean = {figure: float(known[figure]) for figure in self.paper.figures if figure in known}
            values = {figure: [value] for figure, value in mean.items()}
            published = self.paper.figures_of(name)
            rows.append(Row(name, preset.about, [], values, mean, dict.fromkeys(mean), published))
        columns = [figure for figure in self.paper.figures if figure in rows[0].mean]
        return self._table(columns, rows, {}, [])
