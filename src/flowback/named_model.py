"""What a flow and a student have beside their mathematics: class names, settings of their run, files."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from flowback.config import DataConfig, RunConfig
from flowback.data.load import UNNAMED
from flowback.errors import InputError, nearest
from flowback.flow.block import Labels
from flowback.flow.image_model import ImageModel, UserLabels

__all__ = ["NamedModel"]

_SHOWN = 20
"""Classes that a message names."""


class NamedModel(ImageModel):
    """What a model has beside its mathematics: class names, settings of its run, files."""

    classes: tuple[str, ...]
    """Names of the classes; empty if unconditional or unknown."""
    run: RunConfig | None
    """All settings of the run that trained it; None for a new model."""
    folder: Path | None
    """Checkpoint folder that its weights were read from; None for a new model."""

    def set_names(self, classes: Sequence[str]) -> None:
        """Begin with these class names, without settings and files.

        Raises:
            InputError: their number is not the number of classes.
        """
        self.classes, self.run, self.folder = tuple(classes), None, None
        count = self.config.num_classes or 0
        if self.classes and len(self.classes) != count:
            raise InputError(
                f"{len(self.classes)} class names for a model of {count} classes; "
                "give one for each, in the order of their ids."
            )

    def labels(self, labels: UserLabels, batch: int) -> Labels:
        """Labels as a tensor on the flow's device; names become ids, ids and weights stay as they are.

        Raises:
            InputError: an unknown name, ids out of range, a wrong count, or weights of another size.
        """
        if isinstance(labels, str):
            labels = [labels] * batch
        if isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
            labels = [self.class_id(label) if isinstance(label, str) else label for label in labels]
        return super().labels(labels, batch)

    def class_id(self, name: str) -> int:
        """The id of a class by its name; letters with accents match however they are composed.

        Raises:
            InputError: no class of this name, or several.
        """
        ids = [number for number, own in enumerate(self.classes) if own == name]
        ids = ids or [number for number, own in enumerate(self.classes) if _composed(own) == _composed(name)]
        if len(ids) > 1:
            raise InputError(f"The model has {len(ids)} classes called {name}; give an id.")
        if ids:
            return ids[0]
        if not self.classes:
            raise InputError(f"The model does not know the names of its classes; give {name!r} as an id.")
        close = nearest(name, self.classes, only_close=True)
        known = ", ".join(f"{number} = {own}" for number, own in enumerate(self.classes[:_SHOWN]))
        more = ", ..." if len(self.classes) > _SHOWN else ""
        raise InputError(f"The model has no class {name!r}{close or f'; known: {known}{more}'}")

    def take(self, folder: Path, run: RunConfig, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint, as they are.

        Raises:
            InputError: they are of another model.
        """
        try:
            self.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"The weights in {folder} do not fit its config.json: {reason}") from None
        self.run, self.folder = run, folder

    def settings(self) -> RunConfig:
        """Its settings as a checkpoint holds them."""
        run = self.run or RunConfig(data=DataConfig(UNNAMED))
        return RunConfig(self.config, run.data, run.alignment, run.train, run.codec, self.classes)


def _composed(name: str) -> str:
    """macOS writes an accent as a sign of its own, keyboards do not."""
    return unicodedata.normalize("NFC", name)
