"""Writing a prepared set: images decoded by several processes, appended in order, and resumable.

Each 1,024 images are a commit: the columns are flushed to disk, then a line of journal.jsonl says how much of
them counts. After a kill, the columns are cut back to the last line and the work continues from there, so the
outcome is byte for byte that of a run without a kill. At the end everything is read once more and compared
with the journal's hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
from PIL import __version__ as pillow
from pydantic import Field, TypeAdapter

from flowback.checked import to_dict
from flowback.data.columns import FILES, Column, Maker, bytes_of_image, derive, open_columns, settings_of
from flowback.data.decode_pool import TASK, Part, Settings, decoded
from flowback.data.pixels import Note
from flowback.data.prepared import FORMAT, read_summary
from flowback.data.shards import is_sharded
from flowback.data.sources import Source, Split
from flowback.data.vae import Codec
from flowback.errors import InputError
from flowback.files import check_outside, foreign_file, write_json
from flowback.folder_lock import folder_lock
from flowback.progress import bar
from flowback.reading import parse_json, read_json

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

COMMIT = 16
"""Most tasks between commits."""


_OWN_FILES = {"prepared.json", "preparing.json"} | {
    f"{split}/{name}" for split in ("train", "test") for name in (*FILES, "journal.jsonl")
}
"""What the folder of a prepared set may hold."""


COMMIT_BYTES = 2**28
"""Fewer tasks, where they would hold more memory than this before they are written."""


_Count = Annotated[int, Field(strict=True, ge=0)]


@dataclass
class _State:
    """How far a split has come: a line of its journal."""

    items: _Count = 0
    """Images of the source that are done, skipped ones among them."""
    images: _Count = 0
    """Images written."""
    names: _Count = 0
    """Bytes of names written."""
    digest: str = ""
    """Hash of what this commit added to the columns."""
    skipped: list[str] = field(default_factory=list)
    """Files that this commit left out."""
    noted: dict[Note, list[str]] = field(default_factory=dict)
    """Files of this commit by what is to be known of them."""


_STATES = TypeAdapter(_State)


def prepare(
    sources: Mapping[Split, Source],
    out: Path,
    data: str,
    settings: Settings,
    bad_images: Literal["refuse", "skip"] = "refuse",
    workers: int = 0,
    codec: Codec | None = None,
    encoder: Maker | None = None,
) -> dict[str, Any]:
    """Write the set in ``out``; continues where a killed call stopped, and checks a complete set.

    Args:
        sources: the splits.
        out: the set's folder.
        data: where the sources come from, in words.
        settings: size, channels and crop.
        bad_images: stop at an image that cannot be read, or leave it out.
        workers: processes that decode; 0 decodes in this one.
        codec: the VAE of ``settings.codec``; it encodes in this process.
        encoder: the encoder of ``settings.features``: (b, patches, width) of (b, c, h, w) on [-1, 1].

    Returns:
        What prepared.json holds.

    Raises:
        InputError: another set in ``out``, a place inside the source, a source that changed since, unreadable
            images, or a full disk.
    """
    if os.path.isdir(data) and not is_sharded(Path(data)):
        check_outside(out, Path(data))
    prints: dict[str, str] = {split: source.fingerprint for split, source in sources.items()}
    head = {
        "format": FORMAT,
        "source": {"data": data, **prints},
        "settings": to_dict(settings),
        "pillow": pillow,
        "classes": list(sources["train"].classes),
    }
    _check_folder(out, head)
    with folder_lock(out):
        _check_folder(out, head)  # again: what another process made of it meanwhile
        makers: dict[str, Maker] = {} if codec is None else {"latents": codec.encode}
        if encoder is not None:
            makers["features"] = encoder
        return _prepared(sources, out, head, settings, bad_images, workers, makers)


def _prepared(
    sources: Mapping[Split, Source],
    out: Path,
    head: dict[str, Any],
    settings: Settings,
    bad_images: Literal["refuse", "skip"],
    workers: int,
    makers: Mapping[str, Maker],
) -> dict[str, Any]:
    """The set, complete and checked."""
    done, begun = out / "prepared.json", out / "preparing.json"
    if done.is_file():
        summary = read_summary(out)
        for split, stored in summary["splits"].items():
            _verify(out / split, stored["commits"], settings_of(split, settings))
        _tidy(out)
        return summary
    if not begun.is_file():
        _check_room(out, sources, settings)
        write_json(begun, head)
    splits = {}
    for split, source in sources.items():
        split_settings = settings_of(split, settings)
        makes = {
            name: maker
            for name, maker in makers.items()
            if name != "features" or split_settings.features is not None
        }
        commits = _fill(out / split, source, split, split_settings, bad_images, workers, makes)
        if not commits or not commits[-1].images:
            data = head["source"]["data"]
            raise InputError(f"{data} has no readable image for the {split} split; look at its files.")
        rows = [[state.images, state.names, state.digest] for state in commits]
        fingerprint = _verify(out / split, rows, split_settings)
        splits[split] = {
            "images": commits[-1].images,
            "fingerprint": fingerprint,
            "skipped": [name for state in commits for name in state.skipped],
            "noted": _counted(commits),
            "commits": rows,
        }
    summary = {**head, "splits": splits}
    write_json(done, summary)
    _tidy(out)
    return summary


def _tidy(out: Path) -> None:
    """Remove what only an unfinished set needs."""
    for file in (*out.glob("*/journal.jsonl"), out / "preparing.json"):
        file.unlink(missing_ok=True)


def _check_folder(out: Path, head: dict[str, Any]) -> None:
    """Refuse a folder that holds something else.

    A source is known by its content: it may lie elsewhere now.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose another folder.")
    begun = any((out / name).is_file() for name in ("prepared.json", "preparing.json"))
    other = foreign_file(out, lambda name: begun and name in _OWN_FILES)
    if other is not None:
        raise InputError(
            f"--out {out} holds something else ({other}); choose another folder, or move it away."
        )
    for file in (out / "prepared.json", out / "preparing.json"):
        if not file.is_file():
            continue
        try:
            before = {key: value for key, value in read_json(file).items() if key in head}
        except ValueError:
            raise InputError(f"{file} is damaged; choose an empty --out.") from None
        if _prints(before) != _prints(head):
            raise InputError(
                f"{head['source']['data']} changed since {out} was prepared from it, or is another source; "
                "prepare it into an empty --out."
            )
        if {**before, "source": None} != {**head, "source": None}:
            before_settings = before.get("settings")
            before_settings = before_settings if isinstance(before_settings, dict) else {}
            changed = [
                f"{name} (was {value}, now {head['settings'].get(name)})"
                for name, value in before_settings.items()
                if value != head["settings"].get(name)
            ]
            what = ", ".join(changed) or "another version of flowback or Pillow"
            raise InputError(f"{out} was prepared with other settings: {what}; choose an empty --out.")
        return


def _prints(head: dict[str, Any]) -> dict[str, Any]:
    """The hashes of the source, by split."""
    return {split: value for split, value in head.get("source", {}).items() if split != "data"}


def _check_room(out: Path, sources: Mapping[Split, Source], settings: Settings) -> None:
    """Refuse a disk that is too small."""
    needed = sum(
        len(source) * bytes_of_image(settings_of(split, settings)) for split, source in sources.items()
    )
    free = shutil.disk_usage(out).free
    if needed > free:
        less = ", a smaller --encoder-grid" if settings.features else ""
        raise InputError(
            f"The set needs {needed / 1e9:.1f} GB, {out} has only {free / 1e9:.1f}: make room, or choose "
            f"another --out{less}."
        )


def _fill(
    folder: Path,
    source: Source,
    split: str,
    settings: Settings,
    bad_images: str,
    workers: int,
    makers: Mapping[str, Maker],
) -> list[_State]:
    """Decode what is missing of a split; returns all its commits."""
    folder.mkdir(exist_ok=True)
    together = max(1, min(COMMIT, COMMIT_BYTES // (TASK * bytes_of_image(settings))))
    commits = _read_journal(folder / "journal.jsonl")
    with open_columns(folder, settings) as columns, (folder / "journal.jsonl").open("w") as journal:
        while commits and not all(column.holds(_rows(name, commits[-1])) for name, column in columns.items()):
            commits.pop()  # the journal is never ahead of the columns, unless the file system lost them
        state = commits[-1] if commits else _State()
        for name, column in columns.items():
            column.keep(_rows(name, state))
        for commit in commits:
            _note(journal, commit)
        with (
            contextlib.closing(decoded(source, settings, state.items, workers)) as parts,
            bar() as progress,
        ):
            task = progress.add_task(f"preparing {split}", total=len(source), note="")
            waiting: list[Part] = []
            checked = False
            for first, part in zip(range(state.items, len(source), TASK), parts, strict=True):
                if part.skipped and bad_images == "refuse":
                    raise InputError(
                        f"{len(part.skipped)} of the {split} images from {first} on cannot be read: "
                        f"{', '.join(part.skipped[:3])}; repair or remove them, or leave such images out "
                        "with --bad-images skip."
                    )
                waiting.append(replace(part, derived=derive(makers, part.pixels)))
                done = min(first + TASK, len(source))
                progress.update(task, completed=done)
                if len(waiting) == together or done == len(source):
                    if "latents" in makers and split == "train" and not checked:
                        checked = _check_scale(waiting, settings)
                    state = _commit(columns, waiting, state, done)
                    commits.append(state)
                    _note(journal, state)
                    waiting = []
        for name, column in columns.items():
            column.seal(_rows(name, state))
    return commits


def _check_scale(parts: list[Part], settings: Settings) -> bool:
    """Warn of latents whose standard deviation is far from 1; True where there were latents to look at."""
    moments = [part.derived["latents"][:, 0].astype(np.float32) for part in parts if part.names]
    if not moments or settings.codec is None or settings.codec.scale is None:
        return False
    mean, deviation = (np.concatenate([part[:, moment] for part in moments]) for moment in (0, 1))
    spread = math.sqrt(mean.var() + np.square(deviation).mean())
    if spread > 0 and not 0.5 <= spread <= 2:
        logger.warning(
            "The latents of %d images have the standard deviation %.3g; noise levels and presets are made "
            "for about 1. Stop, and prepare into an empty folder with --vae-scale %.3g, or choose "
            "--model.noise-std to match.",
            *(len(mean), spread, settings.codec.scale / spread),
        )
    return True


def _note(journal: IO[str], state: _State) -> None:
    journal.write(json.dumps(vars(state)) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _rows(column: str, state: _State) -> int:
    return state.names if column == "names" else state.images


def _commit(columns: dict[str, Column], parts: list[Part], state: _State, items: int) -> _State:
    """Append and flush; returns the new line of the journal."""
    names = [name for part in parts for name in part.names]
    ends = state.names + np.cumsum([len(name) for name in names], dtype=np.int64)
    added: dict[str, list[np.ndarray]] = {
        "images": [part.pixels for part in parts],
        "labels": [part.labels for part in parts],
        "ends": [ends],
        "names": [np.frombuffer(b"".join(names), dtype=np.uint8)],
    }
    for name in columns.keys() - added.keys():
        added[name] = [part.derived[name] for part in parts if part.names]
    digest = hashlib.blake2b(digest_size=16)
    for name, column in columns.items():
        for rows in added[name]:
            column.append(rows)
            digest.update(rows.data)
    for column in columns.values():
        column.flush()
    return _State(
        items,
        state.images + len(names),
        state.names + sum(map(len, names)),
        digest.hexdigest(),
        [name for part in parts for name in part.skipped],
        _merged(part.noted for part in parts),
    )


def _merged(parts: Iterable[dict[Note, list[str]]]) -> dict[Note, list[str]]:
    """The names of all parts, by note."""
    merged: dict[Note, list[str]] = {}
    for part in parts:
        for note, names in part.items():
            merged.setdefault(note, []).extend(names)
    return merged


def _counted(commits: list[_State]) -> dict[Note, dict[str, Any]]:
    """Number and first names of a split's images with a note."""
    merged = _merged(state.noted for state in commits)
    return {note: {"images": len(names), "first": names[:8]} for note, names in merged.items()}


def _read_journal(file: Path) -> list[_State]:
    commits: list[_State] = []
    if file.is_file():
        for line in file.read_bytes().splitlines():
            try:
                commits.append(_STATES.validate_python(parse_json(line)))
            except ValueError:  # cut short by a kill
                break
    return commits


def _verify(folder: Path, commits: list[list[Any]], settings: Settings) -> str:
    """Read a split from disk and compare it with the hashes of its commits; returns the hash of all.

    Raises:
        InputError: something differs.
    """
    whole = hashlib.blake2b(digest_size=16)
    images = names = 0
    with open_columns(folder, settings) as columns:
        for until_image, until_name, expected in commits:
            digest = hashlib.blake2b(digest_size=16)
            for name, column in columns.items():
                first, until = (names, until_name) if name == "names" else (images, until_image)
                if first <= until and column.holds(until):
                    digest.update(column.read(first, until))
            if digest.hexdigest() != expected:
                raise InputError(
                    f"{folder} is damaged between images {images} and {until_image}; "
                    "remove the set and prepare it again."
                )
            whole.update(digest.digest())
            images, names = until_image, until_name
    return whole.hexdigest()
