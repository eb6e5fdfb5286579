"""Writing a prepared set: images decoded by several processes, appended in order, and resumable.

Each 1,024 images are a commit: the columns are flushed to disk, then a line of journal.jsonl says how much of
them counts. After a kill, the columns are cut back to the last line and the work goes on from there, so the
outcome is byte for byte that of a run without a kill. At the end everything is read once more and compared
with the journal's hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import __version__ as pillow

from flowback.config import to_dict
from flowback.data.codec import Vae
from flowback.data.column import Column
from flowback.data.decoding import TASK, Part, Settings, decoded
from flowback.data.prepared import FORMAT
from flowback.data.sources import Source, Split
from flowback.errors import InputError
from flowback.progress import bar
from flowback.record import write_json

__all__ = ["prepare"]

COMMIT = 16
"""Tasks between commits."""


@dataclass
class _State:
    """How far a split has come: a line of its journal."""

    items: int = 0
    """Images of the source that are done, skipped ones among them."""
    images: int = 0
    """Images written."""
    names: int = 0
    """Bytes of names written."""
    digest: str = ""
    """Hash of what this commit added to the columns."""
    skipped: list[str] = field(default_factory=list)
    """Files that this commit left out."""


def prepare(
    sources: Mapping[Split, Source],
    out: Path,
    data: str,
    settings: Settings,
    bad_images: Literal["refuse", "skip"] = "refuse",
    workers: int = 0,
    codec: Vae | None = None,
) -> dict[str, Any]:
    """Write the set in ``out``; goes on where a killed call stopped, and checks a set that is complete.

    Args:
        sources: the splits.
        out: the set's folder.
        data: where the sources come from, in words.
        settings: size, channels and crop.
        bad_images: stop at an image that cannot be read, or leave it out.
        workers: processes that decode; 0 decodes in this one.
        codec: the VAE of ``settings.codec``; it encodes in this process.

    Returns:
        What prepared.json holds.

    Raises:
        InputError: another set in ``out``, a source that changed since, unreadable images, or a full disk.
    """
    prints: dict[str, str] = {split: source.fingerprint for split, source in sources.items()}
    head = {
        "format": FORMAT,
        "source": {"data": data, **prints},
        "settings": to_dict(settings),
        "pillow": pillow,
        "classes": list(sources["train"].classes),
    }
    done, begun = out / "prepared.json", out / "preparing.json"
    _check_folder(out, head, sources, settings)
    if done.is_file():
        summary = json.loads(done.read_text())
        for split, found in summary["splits"].items():
            _verify(out / split, found["commits"], settings)
        _tidy(out)
        return summary
    if not begun.is_file():
        write_json(begun, head)
    splits = {}
    for split, source in sources.items():
        commits = _fill(out / split, source, split, settings, bad_images, workers, codec)
        if not commits or not commits[-1].images:
            raise InputError(f"{data} has no readable image for the {split} split; look at its files.")
        rows = [[state.images, state.names, state.digest] for state in commits]
        fingerprint = _verify(out / split, rows, settings)
        splits[split] = {
            "images": commits[-1].images,
            "fingerprint": fingerprint,
            "skipped": [name for state in commits for name in state.skipped],
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


def _check_folder(
    out: Path, head: dict[str, Any], sources: Mapping[Split, Source], settings: Settings
) -> None:
    """Refuse a folder that holds something else; and a disk that is too small."""
    for file in (out / "prepared.json", out / "preparing.json"):
        if not file.is_file():
            continue
        try:
            before = {key: value for key, value in json.loads(file.read_text()).items() if key in head}
        except ValueError:
            raise InputError(f"{file} is damaged; choose an empty --out.") from None
        if before.get("source") != head["source"]:
            raise InputError(
                f"{head['source']['data']} changed since {out} was prepared from it, or is another source; "
                "prepare it into an empty --out."
            )
        if before != head:
            changed = [
                f"{name} (was {value}, now {head['settings'].get(name)})"
                for name, value in before.get("settings", {}).items()
                if value != head["settings"].get(name)
            ]
            what = ", ".join(changed) or "another version of flowback or Pillow"
            raise InputError(f"{out} was prepared with other settings: {what}; choose an empty --out.")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not empty and holds no prepared set; choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    each = settings.channels * settings.image_size**2 + 8 * math.prod(settings.latent or (0,))
    needed = sum(len(source) for source in sources.values()) * each
    free = shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"The images need {needed / 1e9:.1f} GB, {out} has {free / 1e9:.1f}: make room, or choose "
            "another --out."
        )


def _fill(
    folder: Path,
    source: Source,
    split: str,
    settings: Settings,
    bad_images: str,
    workers: int,
    codec: Vae | None,
) -> list[_State]:
    """Decode what is missing of a split; returns all its commits."""
    folder.mkdir(exist_ok=True)
    commits = _read_journal(folder / "journal.jsonl")
    with _columns(folder, settings) as columns, (folder / "journal.jsonl").open("w") as journal:
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
            for first, part in zip(range(state.items, len(source), TASK), parts, strict=True):
                if part.skipped and bad_images == "refuse":
                    raise InputError(
                        f"{len(part.skipped)} of the {split} images from {first} on cannot be read: "
                        f"{', '.join(part.skipped[:3])}; repair or remove them, or leave such images out "
                        "with --bad-images skip."
                    )
                waiting.append(part if codec is None else replace(part, latents=_encode(codec, part.pixels)))
                done = min(first + TASK, len(source))
                progress.update(task, completed=done)
                if len(waiting) == COMMIT or done == len(source):
                    state = _commit(columns, waiting, state, done)
                    commits.append(state)
                    _note(journal, state)
                    waiting = []
        for name, column in columns.items():
            column.seal(_rows(name, state))
    return commits


@contextlib.contextmanager
def _columns(folder: Path, settings: Settings) -> Iterator[dict[str, Column]]:
    size = settings.image_size
    columns: list[tuple[str, str, Any, tuple[int, ...]]] = [
        ("images", "images.npy", np.uint8, (settings.channels, size, size)),
        ("labels", "labels.npy", np.int64, ()),
        ("ends", "ends.npy", np.int64, ()),
        ("names", "names.txt", np.uint8, ()),
    ]
    if settings.latent is not None:
        columns.append(("latents", "latents.npy", np.float16, (2, 2, *settings.latent)))
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(contextlib.closing(Column(folder / file, dtype, shape)))
            for name, file, dtype, shape in columns
        }


def _encode(codec: Vae, pixels: np.ndarray) -> np.ndarray:
    """Moments of images and of their mirror images, (b, 2 mirrors, 2 moments, c, h, w)."""
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    if not len(images):
        return np.empty((0, 2, 2, 0, 0, 0), dtype=np.float16)
    moments = torch.stack([codec.encode(images), codec.encode(images.flip(3))], dim=1)
    return moments.half().numpy()


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
        "latents": [part.latents for part in parts if part.latents is not None and len(part.latents)],
    }
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
    )


def _read_journal(file: Path) -> list[_State]:
    commits = []
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                commits.append(_State(**json.loads(line)))
            except (ValueError, TypeError):  # cut short by a kill
                break
    return commits


def _verify(folder: Path, commits: list[list[Any]], settings: Settings) -> str:
    """Read a split from disk and compare it with the hashes of its commits; returns the hash of all.

    Raises:
        InputError: something differs.
    """
    whole = hashlib.blake2b(digest_size=16)
    images = names = 0
    with _columns(folder, settings) as columns:
        for until_image, until_name, expected in commits:
            digest = hashlib.blake2b(digest_size=16)
            for name, column in columns.items():
                span = (names, until_name) if name == "names" else (images, until_image)
                digest.update(column.read(*span))
            if digest.hexdigest() != expected:
                raise InputError(
                    f"{folder} is damaged between images {images} and {until_image}; "
                    "remove the set and prepare it again."
                )
            whole.update(digest.digest())
            images, names = until_image, until_name
    return whole.hexdigest()
