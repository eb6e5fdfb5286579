"""Progress: bars on a terminal, a line now and then in a log; only from the first process."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["bar", "on_terminal", "track"]

T = TypeVar("T")

log = logging.getLogger("flowback")

SECONDS, FIRST = 30.0, 5.0
"""Seconds between two lines of a log, and before the first one."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {self.unit}/s" if speed else "")


def on_terminal() -> bool:
    """Whether stderr is a terminal: bars are shown only there, and a log file gets lines instead."""
    return sys.stderr.isatty()


def bar(unit: str = "images") -> Progress:
    """A progress display on stderr, to use as a context manager; tasks advance in ``unit``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not on_terminal() or os.environ.get("RANK", "0") != "0",
    )


def track(
    items: Iterable[T], total: int, description: str, unit: str = "images", step: int = 1
) -> Iterator[T]:
    """Yield ``items`` while a bar advances by ``step`` at each; off a terminal, the log has lines instead."""
    speaks = not on_terminal() and os.environ.get("RANK", "0") == "0"
    started = time.monotonic()
    due = started + FIRST
    with bar(unit) as progress:
        task = progress.add_task(description, total=total, note="")
        for number, item in enumerate(items, start=1):
            yield item
            progress.advance(task, step)
            now, done = time.monotonic(), min(number * step, total)
            if speaks and now >= due and done < total:
                due, rate = now + SECONDS, done / (now - started)
                left = timedelta(seconds=round((total - done) / rate))
                log.info(
                    "%s: %s of %s, %.3g %s/s, %s left.",
                    description,
                    f"{done:,}",
                    f"{total:,}",
                    rate,
                    unit,
                    left,
                )
