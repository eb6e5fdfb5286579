"""Checkpoints: one folder with the config, the weights people use, and apart from them the training state.

    config.json            format, model, data, alignment and training settings
    model.safetensors      the flow's weights; from training, their moving average
    ema-DECAY.safetensors  further averages, if the run keeps any
    training.pt            raw weights, optimiser and position; only needed to go on training

A folder appears whole or not at all: it is written under a temporary name, flushed to disk and renamed.
config.json holds the SHA-256 of the other files and of its own content, which are compared whenever they
are read.
A run keeps its checkpoints in ``checkpoints/step-NNNNNNNN``, and every function here that takes a path
takes the run's folder too, and then uses the newest.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowback.checked import from_dict, to_dict
from flowback.config import RunConfig
from flowback.devices import pick_device
from flowback.errors import InputError
from flowback.files import write_json

__all__ = [
    "FORMAT",
    "fetch",
    "load_config",
    "load_training_state",
    "load_weights",
    "read_config",
    "resolve",
    "save",
    "step_folders",
]

FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""


def step_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the newest of a run.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if any((path / name).is_file() for name in ("model.safetensors", "training.pt")):
        return path
    folders = step_folders(path)
    if folders:
        return folders[-1]
    if not path.exists():
        raise InputError(f"No checkpoint at {path}: the folder does not exist.")
    raise InputError(
        f"No checkpoint at {path}: give a folder with config.json and model.safetensors, or a run."
    )


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The local folder that ``name`` means: itself, or the copy of a repository on the Hugging Face Hub.

    Args:
        name: a folder, or ``owner/name``, which is looked up on the Hub where no such folder exists.
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: neither of the two, or the Hub does not answer and nothing is cached.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        return path
    from huggingface_hub import snapshot_download  # slow to import: only where something is fetched

    try:
        files = ["config.json", "*.safetensors"]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files, etag_timeout=5))
    except Exception as error:  # many kinds, from the hub, its client and the network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"No checkpoint at {name}: there is no such folder, and the Hub does not give it ({reason})."
        ) from None


def save(
    folder: Path,
    config: RunConfig,
    weights: dict[str, Tensor],
    training: dict[str, Any] | None = None,
    averages: Mapping[float, dict[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint folder atomically; an existing one is replaced.

    Args:
        folder: where it is to stand.
        config: the complete settings.
        weights: the flow's state dict.
        training: state that only further training needs: tensors and plain values.
        averages: state dicts of further averages, by decay.

    Raises:
        InputError: the folder holds something else, or the disk is full.
    """
    folder = Path(folder)
    foreign = folder.exists() and not (folder / "config.json").is_file()
    if foreign and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than a checkpoint; choose another folder.")
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
        if training is not None:
            torch.save(training, temporary / "training.pt")
        settings = {"format": FORMAT, **to_dict(config)}
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        sums["config.json"] = _settings_sum(settings)
        write_json(temporary / "config.json", {**settings, "sha256": sums})
        for written in (*temporary.iterdir(), temporary):
            _flush(written)
        _swap(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (SafetensorError, RuntimeError)):  # so the two writers speak of a full disk
            raise InputError(
                f"{folder} cannot be written: the disk is full, or a quota is met; make room and go on from "
                "the checkpoint before it."
            ) from error
        raise
    _flush(folder.parent)


def _average_file(decay: float) -> str:
    return f"ema-{decay:g}.safetensors"


def _swap(new: Path, folder: Path) -> None:
    """Put the folder ``new`` in the place of ``folder``, without a moment when neither stands there."""
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
    """Let two paths change places in one step; False where the system or the file system cannot.

    Linux's renameat2 with RENAME_EXCHANGE, which Python does not offer.
    """
    here, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _settings_sum(settings: dict[str, Any]) -> str:
    """SHA-256 of config.json's content, in a form that spaces and the order of keys do not change."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _verify(file: Path) -> None:
    """Compare a file of a checkpoint with the sum in its config.json."""
    expected = _read_config(file.parent)["sha256"].get(file.name)
    if not file.is_file():
        raise InputError(f"{file} is missing; the checkpoint is incomplete, take another copy.")
    if expected is not None and _sha256(file) != expected:
        raise InputError(f"{file} is damaged: its SHA-256 differs from config.json; take another copy.")


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, of a format that this flowback reads."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{file} is missing; the checkpoint is incomplete, take another copy.") from None
    except ValueError:
        raise InputError(f"{file} is damaged: it is not JSON; take another copy of the checkpoint.") from None
    found = values.pop("format", None) if isinstance(values, dict) else None
    if not isinstance(found, int):
        raise InputError(f"{file} has no format number: this is not a flowback checkpoint.")
    if found > FORMAT:
        raise InputError(f"{file} has format {found}, this flowback reads up to {FORMAT}; update flowback.")
    values = {"sha256": {}, **values}
    expected = values["sha256"].pop("config.json", None)
    settings = {name: value for name, value in values.items() if name != "sha256"}
    if expected not in (None, _settings_sum({"format": found, **settings})):
        raise InputError(
            f"{file} is damaged: its content has another SHA-256 than it says; take another copy."
        )
    return values


def read_config(folder: Path) -> RunConfig:
    """The settings in ``folder``/config.json, of a checkpoint or of a run that has none yet.

    Raises:
        InputError: missing, damaged, or written by a newer flowback.
    """
    values = _read_config(folder)
    del values["sha256"]
    try:
        return from_dict(RunConfig, values)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


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
        ema: decay of the average, of those the run kept; None is the one it was trained for.

    Raises:
        InputError: no such device, no checkpoint, damaged, or written by a newer flowback.
    """
    device = pick_device(device)
    folder = resolve(path)
    config = read_config(folder)
    decays = config.train.averages
    if ema is not None and ema not in decays:
        raise InputError(f"{folder} keeps no average of decay {ema:g}; it has {', '.join(map(str, decays))}.")
    file = folder / ("model.safetensors" if ema in (None, decays[0]) else _average_file(ema))
    _verify(file)
    try:
        weights = load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}); take another copy of the checkpoint.") from None
    return config, weights


def load_training_state(folder: Path) -> dict[str, Any]:
    """The training state of a checkpoint folder, read without unpickling code.

    Raises:
        InputError: missing or damaged.
    """
    file = folder / "training.pt"
    if not file.is_file():
        raise InputError(f"{file} is missing: this checkpoint can be used, but not trained on.")
    _verify(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}); remove its folder to go on.") from None
