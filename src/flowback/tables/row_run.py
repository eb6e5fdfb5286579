"""One row of a table at one seed: its run, and the record of its evaluation; several rows at once."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowback.alignment.encoders import create_encoder
from flowback.alignment.targets import make_targets
from flowback.checked import from_dict
from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.data.load import load_images
from flowback.devices import cpu_cores
from flowback.errors import InputError, Interrupted, ProcessLostError
from flowback.evaluation.judge import Judge
from flowback.evaluation.linear_probe import probe
from flowback.evaluation.pipeline import evaluate
from flowback.evaluation.references import Reference
from flowback.evaluation.report import Report, weights_of
from flowback.files import plain, write_json
from flowback.model import Flow
from flowback.progress import bar
from flowback.task_config import EvaluateConfig, SampleConfig
from flowback.training import train
from flowback.training.run_folder import read_rows

__all__ = ["RowRun", "run_rows"]

log = logging.getLogger("flowback")

PROBED = 5000
"""Test images of a linear probe, at most."""


@dataclass(frozen=True)
class RowRun:
    """A row at a seed."""

    preset: str
    seed: int
    config: RunConfig
    settings: dict[str, Any]
    """All that decides its figures: `run` those of the weights, `evaluation` the rest."""
    folder: Path
    """Of the run, and of settings.json."""
    file: Path
    """Of the record."""


def run_rows(rows: Sequence[RowRun], jobs: int = 1) -> Iterator[tuple[RowRun, dict[str, Any] | str]]:
    """Train and evaluate rows; gives each row's record when it is done, or the sentence that stopped it.

    Args:
        rows: what to run.
        jobs: so many at once, each in its own process, with an equal share of the cores.

    Raises:
        InputError: a process died.
        Interrupted: a signal came; the same rows can be run again and continue.
    """
    jobs = min(jobs, len(rows))
    if jobs > 1:
        yield from _at_once(rows, jobs)
        return
    images = functools.cache(load_images)
    for number, row in enumerate(rows, start=1):
        log.info("Row %d of %d, seed %d: %s", number, len(rows), row.seed, row.preset)
        description = f"{row.preset}, seed {row.seed} ({number} of {len(rows)})"
        yield row, _outcome(row, *_sets(row, images), description)


def _sets(row: RowRun, load: Any = load_images) -> tuple[ImageSet, ImageSet]:
    """Training and test images."""
    config = row.config
    size, channels = config.model.image_size, config.model.channels
    train_images, test = (load(config.data, size, channels, split) for split in ("train", "test"))
    return train_images, test


def _outcome(row: RowRun, images: ImageSet, test: ImageSet, description: str) -> dict[str, Any] | str:
    """The record, or the sentence that stopped the row."""
    try:
        write_json(row.folder / "settings.json", row.settings["run"])
        flow = train(row.config, out=row.folder, description=description).flow
        report = _measure(flow, images, test, row.settings["evaluation"])
    except InputError as error:
        return str(error)
    except (Interrupted, ProcessLostError):
        raise
    except Exception as error:  # no memory for a large row, say, or a defect: the others go on
        log.exception("%s, seed %d failed.", row.preset, row.seed)
        return f"{type(error).__name__}: {error}"
    record = {
        "preset": row.preset,
        "seed": row.seed,
        "settings": row.settings,
        "run": str(row.folder),
        "training": _curve(row.folder / "metrics.jsonl"),
        "report": report,
    }
    write_json(row.file, record)
    return plain(record)


def _at_once(rows: Sequence[RowRun], jobs: int) -> Iterator[tuple[RowRun, dict[str, Any] | str]]:
    """Each row in a process of a pool; a bar counts them."""
    _keep_what_is_shared(rows)
    context, threads = multiprocessing.get_context("spawn"), max(1, cpu_cores() // jobs)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    )
    try:
        waiting = {pool.submit(_alone, row): row for row in rows}
        with bar("rows") as progress:
            task = progress.add_task(f"rows, {jobs} at once", total=len(rows), note="")
            for done in as_completed(waiting):
                row = waiting[done]
                outcome = done.result()
                progress.update(task, advance=1, note=f"{row.preset}, seed {row.seed}")
                log.info("Done: %s, seed %d; what it said is in %s", row.preset, row.seed, _log_file(row))
                yield row, outcome
    except BrokenProcessPool:
        raise InputError(
            "A process that ran a row died, for want of memory perhaps; run the same command again to "
            "continue, with fewer --jobs."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # those that run have had the signal too, and save


def _log_file(row: RowRun) -> Path:
    return row.file.with_suffix(".log")


def _alone(row: RowRun) -> dict[str, Any] | str:
    """A row in a process of its own, which speaks into a file: bars of several would overwrite each other."""
    file = _log_file(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", buffering=1) as said:
        handler = logging.StreamHandler(said)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        sys.stderr, before = said, sys.stderr
        try:
            return _outcome(row, *_sets(row), f"{row.preset}, seed {row.seed}")
        finally:
            sys.stderr = before
            log.removeHandler(handler)


def _keep_what_is_shared(rows: Sequence[RowRun]) -> None:
    """Compute tables of features and the reference's statistics once, before several processes need them."""
    seen: set[Any] = set()
    for row in rows:
        config = row.config
        aligned = config.alignment
        key = (
            *(config.data, config.model.grid, row.settings["evaluation"]["kind"]),
            *((aligned.encoder, aligned.weights, aligned.grid) if aligned.active else ()),
        )
        if key in seen:
            continue
        seen.add(key)
        images, _ = _sets(row)
        make_targets(config, images)
        if row.settings["evaluation"]["kind"] == "quality":
            Judge(Reference.of(images), create_encoder("efficientnet_lite0"))


def _measure(flow: Flow, images: ImageSet, test: ImageSet, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of a flow, as plain data."""
    if settings["kind"] == "probe":
        probed = probe(
            flow, images, test, seed=settings["seed"], test_limit=PROBED, encoder=None, progress=True
        )
        figures: dict[str, Any] = {
            "best_linear": probed.best.linear,
            "top1_gradient": probed.top1_gradient,
            "locations": {
                f"{p.location[0]}.{p.location[1]}": {"linear": p.linear, "knn": p.knn}
                for p in probed.locations
            },
        }
        return Report("probe", figures, {**settings, **weights_of(flow)}).to_dict()
    config = from_dict(EvaluateConfig, settings["options"])
    sampling = from_dict(SampleConfig, settings["sampling"])
    return evaluate(flow, test, reference=images, config=config, sampling=sampling, progress=True).to_dict()


def _curve(file: Path) -> list[dict[str, float]]:
    """The evaluations along a run: images seen, seconds of training, and the test figures."""
    rows = read_rows(file)
    measured = ("test_", "fd_")
    kept = ("images", "seconds", *measured)
    return [
        {name: float(value) for name, value in row.items() if name.startswith(kept) and value is not None}
        for row in rows
        if any(name.startswith(measured) for name in row)
    ]
