"""A run's folder: its records, the checkpoint that it continues from, and the options that may change then.

config.json, environment.json, README.md   settings, machine and versions of each start, the command
metrics.jsonl, bad-steps.jsonl             rows as they come
checkpoints/step-NNNNNNNN                  see :mod:`flowback.checkpoint`

Checkpoints are written while training continues: it waits for a copy of its state, not for the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback import checkpoint
from flowback.checked import to_dict
from flowback.config import RunConfig
from flowback.errors import InputError
from flowback.files import foreign_file, plain, replacing, write_json
from flowback.provenance import environment
from flowback.reading import parse_json, read_json

__all__ = ["RunFolder", "Stored", "Writer", "read_rows"]

log = logging.getLogger("flowback")

_BESIDE = re.compile(r"settings\.json|[^/]+\.(log|out|err)")
"""What may lie in the folder of a new run: notes of `flowback reproduce`, a shell's or scheduler's log."""


MAY_CHANGE = {
    "train": {"steps", "micro_batch", "device", "log_every", "eval_every", "save_every", "sample_every"}
    | {"eval_exhaustive", "frechet_every", "frechet_samples"}
    | {"diagnose_every", "eval_images", "keep_last", "keep_every", "trackers", "timeout"}
    | {"checkpoint_activations", "shard"},
    "data": {"path", "workers", "download", "bad_images"},
    "alignment": {"weights"},
    "codec": {"vae", "revision"},
    "student": {"teacher"},
}
"""Options that a resumed run may change; all others would make it another run."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a run continues from."""

    folder: Path
    """The checkpoint."""
    training: dict[str, Any]
    averages: dict[float, dict[str, Tensor]]
    """Averaged weights by decay."""


class RunFolder:
    """The folder of one run.

    Args:
        path: where it is, or is to be.
        config: the run.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config

    def check(self) -> None:
        """Refuse, before the work begins, a folder that holds something other than a run.

        Raises:
            InputError: names what is there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file; choose another folder.")
        if (self.path / "model.safetensors").exists():
            raise InputError(f"--out {self.path} holds a checkpoint, not a run; choose another folder.")
        if (self.path / "config.json").exists() or checkpoint.step_folders(self.path):
            return  # a run, which is compared before it is continued
        other = foreign_file(self.path, lambda name: _BESIDE.fullmatch(name) is not None)
        if other is not None:
            raise InputError(
                f"--out {self.path} holds something else ({other}); choose another folder, or move it away."
            )

    def begin(self, device: torch.device, processes: int) -> None:
        """Describe a new run.

        Raises:
            InputError: the folder cannot be written, or holds something else.
        """
        self.check()
        written = self.path / "config.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if written.exists():  # stopped before its first checkpoint: start over
                self.compare(checkpoint.read_config(self.path))
            write_json(written, {"format": checkpoint.FORMAT, **to_dict(self.config)})
            identity = {"id": secrets.token_hex(4)}
            write_json(self.path / "environment.json", identity | _environment(device, processes))
            with replacing(self.path / "README.md") as file:
                file.write(_readme(self.config))
            self.keep_rows(0)
        except OSError as error:
            raise InputError(
                f"--out {self.path} cannot be written: {error.strerror}; choose another folder."
            ) from None

    def goes_on(self, step: int, device: torch.device, processes: int) -> dict[str, Any]:
        """Note that the run continues from ``step``; returns the last row of metrics up to there."""
        file = self.path / "environment.json"
        now = _environment(device, processes)
        try:
            first = read_json(file)
        except (OSError, ValueError):  # lost or damaged: the training itself does not need it
            first = {"id": secrets.token_hex(4), **now}
        if not _is_record(first):
            first = {"id": secrets.token_hex(4), **now}
        before = [first, *first.get("resumed", [])][-1]
        changed = [
            f"{name} {now['versions'].get(name)} (was {version})"
            for name, version in before.get("versions", {}).items()
            if now["versions"].get(name) != version
        ]
        if changed:
            log.warning("Continuing with %s: results may differ by rounding from here.", ", ".join(changed))
        resumed = [*first.get("resumed", []), {"step": step, **now}]
        write_json(file, {**first, "resumed": resumed})
        write_json(self.path / "config.json", {"format": checkpoint.FORMAT, **to_dict(self.config)})
        return self.keep_rows(step)

    @property
    def identity(self) -> str:
        """The same for all parts of a run, and for no other run."""
        return read_json(self.path / "environment.json")["id"]

    def newest(self) -> Stored | None:
        """The newest usable checkpoint; damaged ones are named in the log. None if there is no checkpoint.

        Raises:
            InputError: none is usable, or options changed that must not.
        """
        folders = checkpoint.step_folders(self.path)
        for folder in reversed(folders):
            try:
                stored, training = checkpoint.load_config(folder), checkpoint.load_training_state(folder)
                if stored.train.averages == self.config.train.averages:  # else compare() refuses
                    averages = {
                        decay: checkpoint.load_weights(folder, ema=decay)[1]
                        for decay in self.config.train.averages
                    }
            except InputError as error:
                log.warning("%s Using the checkpoint before it.", error)
                continue
            self.compare(stored)
            return Stored(folder, training, averages)
        if folders:
            raise InputError(
                f"No checkpoint in {self.path} is usable; remove {self.path / 'checkpoints'} to start again."
            )
        return None

    def compare(self, stored: RunConfig) -> None:
        """Say which options changed, and refuse those that would make it another run.

        Raises:
            InputError: names them; or the classes have other names, or another order.
        """
        refused: list[str] = []
        allowed: list[str] = []
        for section, name, old, new in _differences(stored, self.config):
            change = f"--{section}.{name.replace('_', '-')} (was {old}, now {new})"
            (allowed if name in MAY_CHANGE.get(section, set()) else refused).append(change)
        if refused:
            may = sorted(f"{s}.{name.replace('_', '-')}" for s, names in MAY_CHANGE.items() for name in names)
            raise InputError(
                f"{self.path} holds a run with other settings: {', '.join(refused)}; "
                f"choose another --out, or the settings of that run (these may change: {', '.join(may)})."
            )
        if stored.classes and stored.classes != self.config.classes:
            raise InputError(
                f"{self.path} was trained on {_classes(stored)}; the data now have {_classes(self.config)}. "
                "Give the data of that run, or choose another --out."
            )
        if allowed:
            log.warning("Continuing with changed options: %s.", ", ".join(allowed))

    def sweep(self) -> None:
        """Remove what a killed run left half-saved."""
        for partial in (self.path / "checkpoints").glob(".step-*"):
            shutil.rmtree(partial, ignore_errors=True)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to a .jsonl file."""
        file = self.path / name
        try:
            with file.open("a") as stream:
                stream.write(json.dumps(plain(row), allow_nan=False) + "\n")
        except OSError as error:
            error.filename = str(file)  # writing, unlike opening, does not know it
            raise

    def keep_rows(self, step: int) -> dict[str, Any]:
        """Drop the rows after ``step``, which will be written again; returns the last row of metrics kept."""
        last: dict[str, Any] = {}
        for name in ("bad-steps.jsonl", "metrics.jsonl"):
            file = self.path / name
            if not file.exists() and name != "metrics.jsonl":
                continue
            rows = [row for row in read_rows(file) if row["step"] <= step]
            with replacing(file) as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
            last = rows[-1] if rows else {}
        return last

    def remove_old(self) -> None:
        """Remove the checkpoints that are neither among the newest nor to be kept."""
        train = self.config.train
        for folder in checkpoint.step_folders(self.path)[: -train.keep_last]:
            step = int(folder.name.removeprefix("step-"))
            linked = folder.is_symlink()  # somebody's own, to another place
            if not linked and (not train.keep_every or step % train.keep_every):
                shutil.rmtree(folder)


def _differences(one: RunConfig, two: RunConfig) -> Iterator[tuple[str, str, Any, Any]]:
    for section in (field.name for field in dataclasses.fields(RunConfig)):
        before, now = getattr(one, section), getattr(two, section)
        if not dataclasses.is_dataclass(before):  # the class names, which no option gives
            continue
        for field in dataclasses.fields(before):
            old, new = getattr(before, field.name), getattr(now, field.name)
            if old != new:
                yield section, field.name, old, new


def _classes(config: RunConfig) -> str:
    shown = ", ".join(config.classes[:8]) + (", ..." if len(config.classes) > 8 else "")
    return f"the classes {shown}" if shown else "classes without names"


def _environment(device: torch.device, processes: int) -> dict[str, Any]:
    return {**environment(device), "processes": processes}


def _is_record(first: dict[str, Any]) -> bool:
    """Whether environment.json is what :meth:`RunFolder.begin` and later starts wrote."""
    resumed = first.get("resumed", [])
    starts = [first, *resumed] if isinstance(resumed, list) else []
    return bool(starts) and all(
        isinstance(start, dict) and isinstance(start.get("versions", {}), dict) for start in starts
    )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl or bad-steps.jsonl, but for one cut short; none without the file."""
    rows = []
    if file.is_file():
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                row = parse_json(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def _readme(config: RunConfig) -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return (
        f"# A run of flowback\n\nStarted with `{command}`; run it again to continue where it stopped.\n\n"
        "- `config.json`: every setting; `environment.json`: versions, commit, device of each start\n"
        f"- `metrics.jsonl`: a row every {config.train.log_every} steps, nll in nats per dimension\n"
        "- `checkpoints/`: use with `flowback sample`, `flowback classify` or `Flow.from_pretrained`\n"
    )


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
        """Let the job finish, even if something else has failed."""
        self._thread.shutdown()
        if self._job is not None and (error := self._job.exception()):
            log.warning("%s", error)
