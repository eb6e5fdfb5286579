"""Checkpoints: one folder with the config, the weights to use and, apart from them, the training state.

    config.json            format, model, data, alignment and training settings
    model.safetensors      the flow's weights; from training, their moving average. Of a published flow
                           perhaps in fp16, which is read as fp32
    ema-DECAY.safetensors  further averages, if the run keeps any
    training.pt            raw weights, optimiser and position; needed only to continue training
    README.md, samples.png, evaluation.json   of a published flow: its model card, what that shows, its record

A repository on the Hub holds the same files, without the training state.
A folder appears complete or not at all: it is written under a temporary name, flushed to disk and renamed.
config.json holds the SHA-256 of the other files, which is checked whenever they are read, and of its own
sections. You may edit it (if the data have moved, say); a warning then names the sections that changed.
A run keeps its checkpoints in ``checkpoints/step-NNNNNNNN``; functions that take a path also take the run's
folder, and then use its newest checkpoint.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowback import hub
from flowback.checked import from_dict, to_dict
from flowback.config import RunConfig
from flowback.devices import pick_device
from flowback.errors import InputError, nearest
from flowback.files import file_hash, foreign_file, write_json
from flowback.reading import read_json, read_tensors

__all__ = [
    "CARD_FILES",
    "FORMAT",
    "PACKAGED",
    "fetch",
    "load_config",
    "load_training_state",
    "load_weights",
    "packaged",
    "read_config",
    "resolve",
    "save",
    "step_folders",
]

FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""
PACKAGED = Path(__file__).parent / "weights"
"""Folder of the flows that come with the package."""
CARD_FILES = ("README.md", "samples.png", "evaluation.json")
"""What stands beside the weights of a published flow: model card, picture, evaluation record."""
_SHOWN = 8
"""Most runs that a message names."""
_LOOKED_AT = 1000
"""Folders, at most, in which a message looks for runs."""
_OWN_FILES = re.compile(
    r"config\.json|(model|ema-[\d.e-]+)\.safetensors|training\.pt|sampling-plan\.json|evaluation/.*"
)
"""What a checkpoint's folder may hold: its own files, and what other verbs write beside them."""

log = logging.getLogger("flowback")


def step_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; ``run`` is its folder or ``checkpoints`` in it."""
    run = Path(run)
    places = [run / "checkpoints", *([run] if run.name == "checkpoints" else [])]
    folders = [folder for place in places for folder in place.glob("step-*") if folder.is_dir()]
    return sorted(folder for folder in folders if re.fullmatch(r"step-[0-9]{8}", folder.name))


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the newest of a run.

    Raises:
        InputError: there is none; the message names the runs in the folder, if it holds any.
    """
    path = Path(path)
    if _is_checkpoint(path):
        return path
    folders = step_folders(path)
    if folders:
        return folders[-1]
    if not path.exists():
        above = next((parent for parent in path.parents if parent.is_dir()), path)
        near = "" if len(path.parts) - len(above.parts) > 2 else _listed(_runs_in(above))
        hint = f"; in {above} there are {near}" if near else ""
        raise InputError(f"No checkpoint at {path}: the folder does not exist{hint}.")
    if not path.is_dir():
        raise InputError(f"No checkpoint at {path}: it is a file; give the folder of a checkpoint or a run.")
    runs = _listed(_runs_in(path))
    if runs:
        raise InputError(f"No checkpoint at {path}, but there are some inside it; give one of {runs}.")
    raise InputError(
        f"No checkpoint at {path}: give a folder with config.json and model.safetensors, or a run's folder."
    )


def _runs_in(folder: Path) -> list[str]:
    """Runs and checkpoints in a folder, or in the folders in it."""
    places: list[Path] = []
    for pattern in ("*", "*/*"):
        places += sorted(place for place in folder.glob(pattern) if not place.name.startswith("."))[
            :_LOOKED_AT
        ]
    found = [place for place in places if _is_checkpoint(place) or step_folders(place)]
    return [str(place) for place in found if not {*place.parents} & {*found} and place.name != "checkpoints"]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in ("model.safetensors", "training.pt"))


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The local folder that ``name`` means.

    Args:
        name: a folder; if there is none, a flow that comes with the package (:func:`packaged`), or
            ``owner/name`` or ``owner/name@revision`` of a repository on the Hugging Face Hub. Of that, the
            copy in the Hub's cache is used, brought up to date if the Hub answers.
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: none of these.
    """
    path, text = Path(name), str(name)
    if path.exists():
        return path
    if text in packaged():
        return PACKAGED / text
    found = hub.REPOSITORY.fullmatch(Path(name).as_posix() if isinstance(name, Path) else text)
    if found is None:
        hint = nearest(text, packaged(), only_close=True) if path.name == text else ""
        if hint:
            raise InputError(f"No checkpoint at {name}: there is no such folder{hint}")
        return path
    repository, revision = found["name"], revision or found["revision"]
    try:
        folder = hub.download(repository, revision, ["config.json", "*.safetensors", *CARD_FILES])
    except Exception as error:  # many kinds, from the Hub, its client, the network and the disk
        reason = hub.reason(error, repository, revision)
        raise InputError(f"No checkpoint at {name}: there is no such folder, and {reason}.") from None
    if not (folder / "model.safetensors").is_file():
        raise InputError(
            f"No checkpoint at {name}: the Hub's cache has no model.safetensors of it; it is no flow, or its "
            "download is incomplete: connect, and try again."
        )
    return folder


def packaged() -> list[str]:
    """Names of the flows that come with flowback."""
    return sorted(file.parent.name for file in PACKAGED.glob("*/config.json"))


def save(
    folder: Path,
    config: RunConfig,
    weights: dict[str, Tensor],
    training: dict[str, Any] | None = None,
    averages: Mapping[float, dict[str, Tensor]] | None = None,
    card: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint folder atomically; an existing one is replaced.

    Args:
        folder: where to write it.
        config: the complete settings.
        weights: the flow's state dict.
        training: state that only further training needs: tensors and plain values.
        averages: state dicts of further averages, by decay.
        card: contents of :data:`CARD_FILES`, by name.

    Raises:
        InputError: the folder holds something else, or the disk is full.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file; choose a folder.")
    hidden = (place for place in folder.glob(".*") if place.is_dir())  # a clone's .git, say
    known = CARD_FILES if card else ()  # a card that somebody wrote is not replaced by none
    other = foreign_file(folder, lambda name: name in known or _OWN_FILES.fullmatch(name) is not None)
    other = other or next(hidden, None)
    if other is not None:  # the folder is replaced as a whole: a run would lose its checkpoints
        raise InputError(
            f"{folder} holds something other than a checkpoint ({other}); choose another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = {"model.safetensors": weights}
        files |= {_average_file(decay): average for decay, average in (averages or {}).items()}
        for name, tensors in files.items():
            contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(contiguous, temporary / name, metadata={"format": "pt"})
            # safetensors makes it readable for its owner alone: the umask decides, as it did for the folder.
            (temporary / name).chmod(temporary.stat().st_mode & 0o666)
        if training is not None:
            torch.save(training, temporary / "training.pt")
        settings = to_dict(config)
        sums: dict[str, Any] = {file.name: file_hash(file) for file in sorted(temporary.iterdir())}
        sums["config.json"] = _section_sums(settings)
        write_json(temporary / "config.json", {"format": FORMAT, **settings, "sha256": sums})
        for name, content in (card or {}).items():
            (temporary / name).write_bytes(content)
        for written in (*temporary.iterdir(), temporary):
            _flush(written)
        _swap(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (SafetensorError, RuntimeError)):  # how the two writers report a full disk
            raise InputError(
                f"{folder} cannot be written: the disk is full, or a quota is reached; make room, and "
                "continue from the previous checkpoint."
            ) from error
        raise
    _flush(folder.parent)


def _average_file(decay: float) -> str:
    return f"ema-{decay:g}.safetensors"


def _swap(new: Path, folder: Path) -> None:
    """Replace ``folder`` by the folder ``new``; at every moment one of the two is there."""
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        shutil.rmtree(new)
    else:  # two renames: a kill between them leaves the old one under a temporary name
        old = new.with_name(new.name + ".old")
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two paths in one step; False if the system or the file system cannot.

    Linux's renameat2 with RENAME_EXCHANGE, which Python does not offer.
    """
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def _flush(path: Path) -> None:
    """Flush a file or a folder to disk; Windows does so only for files, and only if open for writing."""
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _verify(file: Path) -> None:
    """Compare a file of a checkpoint with its SHA-256 in config.json."""
    expected = _read_config(file.parent)["sha256"].get(file.name)
    if not file.is_file():
        raise InputError(f"{file} is missing: the checkpoint is incomplete; use another copy.")
    if expected is not None and file_hash(file) != expected:
        raise InputError(f"{file} is damaged: its SHA-256 is not the one in config.json; use another copy.")


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, of a format that this flowback reads."""
    file = folder / "config.json"
    try:
        values = read_json(file)
    except FileNotFoundError:
        raise InputError(f"{file} is missing: the checkpoint is incomplete; use another copy.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}; use another copy of the checkpoint.") from None
    version, sums = values.pop("format", None), values.setdefault("sha256", {})
    if type(version) is not int or version < 1:  # True is an int, too
        raise InputError(f"{file} has no format number: this is not a flowback checkpoint.")
    if version > FORMAT:
        raise InputError(f"{file} has format {version}, but this flowback reads up to {FORMAT}; update it.")
    if not isinstance(sums, dict) or not isinstance(sums.get("config.json", {}), dict):
        raise InputError(f"{file} is damaged: sha256 is no list of checksums; use another copy.")
    return values


def _section_sums(settings: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each section, independent of spaces and the order of keys."""
    return {
        name: hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()
        for name, section in settings.items()
    }


@functools.cache
def _warn(message: str) -> None:
    """Warn once per message, since a command reads its checkpoint several times."""
    log.warning(message)


def read_config(folder: Path) -> RunConfig:
    """The settings in ``folder``/config.json, of a checkpoint or of a run that has none yet.

    If they were edited after the checkpoint was written, a warning names the sections.

    Raises:
        InputError: missing, not readable, or written by a newer flowback.
    """
    values = _read_config(folder)
    written = values.pop("sha256").get("config.json", {})
    try:
        config = from_dict(RunConfig, values)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    now = _section_sums(values)
    changed = [name for name, checksum in written.items() if now.get(name) != checksum]
    if changed:
        edited = ", ".join(changed)
        _warn(f"{folder / 'config.json'} was edited after it was written ({edited}); it is used as it is.")
    return config


def load_config(path: str | Path) -> RunConfig:
    """The settings stored in a checkpoint; see :func:`resolve` and :func:`read_config`."""
    return read_config(resolve(path))


def load_weights(
    path: str | Path, device: torch.device | str = "cpu", ema: float | None = None
) -> tuple[RunConfig, dict[str, Tensor]]:
    """Settings and averaged weights of a checkpoint or a run.

    Args:
        path: a checkpoint folder, or a run's folder (its newest checkpoint).
        device: where the weights go.
        ema: decay of the average to load, if the run kept several; None is its main one.

    Raises:
        InputError: no such device, no checkpoint, damaged, or written by a newer flowback.
    """
    device = pick_device(device)
    folder = resolve(path)
    config = read_config(folder)
    decays = config.train.averages
    if ema is not None and ema not in decays:
        raise InputError(f"{folder} has no average with decay {ema:g}; it has {', '.join(map(str, decays))}.")
    file = folder / ("model.safetensors" if ema in (None, decays[0]) else _average_file(ema))
    _verify(file)
    try:
        weights = load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}); use another copy of the checkpoint.") from None
    dtypes = {value.dtype for value in weights.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        shown = ", ".join(sorted(map(str, dtypes))) or "nothing"
        raise InputError(f"{file} holds {shown}, not weights of one floating-point type; use another copy.")
    if torch.float16 in dtypes:  # a way to store them: nothing computes in it
        weights = {name: value.float() for name, value in weights.items()}
    return config, weights


def load_training_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint folder, read without unpickling code.

    Raises:
        InputError: missing or damaged.
    """
    file = folder / "training.pt"
    if not file.is_file():
        raise InputError(f"{file} is missing: this checkpoint can be used, but its training cannot continue.")
    _verify(file)
    try:
        training = read_tensors(file)
        if not isinstance(training, dict):
            raise ValueError("it holds no named parts")
        return training
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); remove its folder to continue.") from None
