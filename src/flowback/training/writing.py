"""Checkpoints are written beside the training: it waits for a copy of its state, not for the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Writer"]

log = logging.getLogger("flowback")


class Writer:
    """One job at a time, in a thread of its own.

    Serialising, hashing and flushing leave Python's lock to the training.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "flowback-writer")
        self._job: Future[None] | None = None

    def start(self, job: Callable[..., None], *arguments: Any) -> Future[None]:
        """Wait for the job before, and start this one; its arguments must not change any more."""
        self.wait()
        self._job = self._thread.submit(job, *arguments)
        return self._job

    def check(self) -> None:
        """Raise what the job raised, if it is over."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Until the job is over; raises what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Let the job come to its end, whatever else has failed meanwhile."""
        self._thread.shutdown()
        if self._job is not None and (error := self._job.exception()):
            log.warning("%s", error)
