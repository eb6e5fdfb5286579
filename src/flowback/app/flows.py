"""The flows that an app shows: the newest checkpoint of each run, and older ones to compare with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from flowback import checkpoint
from flowback.config import RunConfig
from flowback.errors import InputError
from flowback.model import Flow

__all__ = ["Flows"]


class Flows:
    """Flows of the same images and classes, by name; a flow is loaded when it is first asked for.

    Args:
        runs: folders of runs or checkpoints, or names on the Hub; the first is the app's own flow.
        device: where they go.

    Raises:
        InputError: no such checkpoint, a flow of latents, or flows of different images or classes.
    """

    def __init__(self, runs: Sequence[str | Path], device: torch.device | str = "cpu") -> None:
        self.device, self.folders = device, dict[str, Path]()
        """Checkpoint folders by the name that visitors see, which has no path."""
        first: RunConfig | None = None
        for run in runs:
            fetched = checkpoint.fetch(run)
            newest = checkpoint.resolve(fetched)
            older = [folder for folder in reversed(checkpoint.step_folders(fetched)) if folder != newest]
            for folder in (newest, *older):
                config = checkpoint.load_config(folder)
                first = first or config
                _check(run, config, first)
                self.folders[self._name(str(run), folder)] = folder
        assert first is not None
        self.config = first
        self._flows: dict[str, Flow] = {}
        self._loading = threading.Lock()

    def _name(self, run: str, folder: Path) -> str:
        base = Path(run).resolve().name if Path(run).exists() else run
        step = folder.name.removeprefix("step-")
        name = f"{base}, step {int(step)}" if step != folder.name and base != folder.name else base
        return name if name not in self.folders else f"{name} ({len(self.folders) + 1})"

    @property
    def names(self) -> list[str]:
        """Of all flows, the app's own first."""
        return list(self.folders)

    def __getitem__(self, name: str) -> Flow:
        if name not in self.folders:
            raise InputError("There is no such flow here; reload the page.")
        with self._loading:
            if name not in self._flows:
                self._flows[name] = Flow.from_pretrained(self.folders[name], self.device)
            return self._flows[name]

    @property
    def own(self) -> Flow:
        """The app's own flow."""
        return self[self.names[0]]


def _check(run: str | Path, config: RunConfig, first: RunConfig) -> None:
    if config.codec.vae is not None:
        raise InputError(f"{run} models the latents of a VAE; the app shows flows of pixels.")
    shapes = [(c.model.image_size, c.model.channels, c.model.num_classes) for c in (config, first)]
    if shapes[0] != shapes[1] or config.classes != first.classes:
        raise InputError(
            f"{run} has other images or classes than the first run; the app compares flows of the same data."
        )
