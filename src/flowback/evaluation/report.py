"""One report for each evaluation: the figures, and everything needed to repeat them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flowback.errors import InputError
from flowback.files import plain, write_json
from flowback.named_model import NamedModel
from flowback.provenance import environment
from flowback.reading import read_json
from flowback.sampling.block_plan import weights_hash

__all__ = ["Comparison", "Report", "compare", "weights_of"]


def weights_of(flow: NamedModel) -> dict[str, str | None]:
    """For the settings: the checkpoint that a model comes from, if any, and the hash of its weights."""
    folder = str(flow.folder) if flow.folder is not None else None
    return {"checkpoint": folder, "weights_sha256": weights_hash(flow)}


@dataclass(frozen=True)
class Report:
    """What an evaluation measured, and what is needed to repeat it.

    Example:
        >>> report = Report("evaluate", {"fid": 3.5}, {"samples": 50_000})
        >>> report.figures["fid"], sorted(report.to_dict())
        (3.5, ['environment', 'figures', 'kind', 'settings', 'warnings'])
    """

    kind: str
    """`evaluate`, `classify` or `probe`."""
    figures: dict[str, Any]
    """Names to numbers."""
    settings: dict[str, Any]
    """All that decides them: data, protocol, counts, seeds, guidance, hashes of weights and reference."""
    warnings: tuple[str, ...] = ()
    """Sentences that belong beside the figures."""
    environment: dict[str, Any] = field(default_factory=environment)
    """Versions, commit, command, date, device."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as :meth:`save` writes them."""
        return plain(asdict(self))

    def save(self, path: Path | str) -> None:
        """Write it as JSON; the file appears whole or not at all."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """A report that was written as JSON.

        Raises:
            InputError: no such file, or no report.
        """
        try:
            values = read_json(Path(path))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError:
            raise InputError(
                f"{path} is not JSON; give a report of flowback evaluate, classify or probe."
            ) from None
        parts, said = ("figures", "settings", "environment"), values.get("warnings") or []
        if not all(isinstance(values.get(part), dict) for part in parts) or not isinstance(said, list):
            raise InputError(f"{path} is not a report of flowback evaluate, classify or probe.")
        warnings = tuple(map(str, said))
        figures, settings, around = (values[part] for part in parts)
        return cls(str(values.get("kind")), figures, settings, warnings, around)


class Comparison(NamedTuple):
    """Two reports side by side."""

    figures: list[tuple[str, Any, Any]]
    """Every figure that is a number in either report."""
    settings: list[tuple[str, Any, Any]]
    """What decides the figures and is not the same."""
    environment: list[tuple[str, Any, Any]]
    """Versions, commit and device, where not the same."""


_APART = ("command", "date")
"""Parts of the environment that differ between any two runs."""


def compare(a: Report, b: Report) -> Comparison:
    """Figures of both reports, and the settings and environment in which they differ."""
    first, second = a.to_dict(), b.to_dict()
    figures = [
        row
        for row in _paired(first["figures"], second["figures"])
        if any(isinstance(value, (int, float)) and not isinstance(value, bool) for value in row[1:])
    ]
    settings = _paired(*({"kind": side["kind"], **side["settings"]} for side in (first, second)))
    around = [row for row in _paired(first["environment"], second["environment"]) if row[0] not in _APART]
    return Comparison(figures, *([row for row in rows if row[1] != row[2]] for rows in (settings, around)))


def _paired(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Values of both under their dotted names, in the order of the first."""
    left, right = _flat(a), _flat(b)
    return [(name, left.get(name), right.get(name)) for name in {**left, **right}]


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        items = [(str(index), value) for index, value in enumerate(data, start=1)]
    else:
        return {name: data}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{name}.{key}" if name else key)
    return flat
