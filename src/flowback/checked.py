"""Dataclasses whose values are checked when they are created, and their conversion to JSON and back.

Values are converted to the type of their field if that loses nothing (a list to a tuple, text to a path, the
text ``1e-3``, as YAML reads it, to a number); pydantic decides. Numbers must be finite. Anything else, and
any unknown key, raises InputError with one sentence that names the option.
"""

from __future__ import annotations

import functools
import json
import math
import reprlib
import types
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from flowback.errors import InputError, nearest, shorten

__all__ = ["Checked", "from_dict", "replaced", "require", "require_one_of", "to_dict"]

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise InputError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def require_one_of(value: object, choices: Any, what: str) -> None:
    """Raise InputError unless ``value`` is one of ``choices``, the values of a Literal.

    Example:
        >>> require_one_of("tset", Literal["train", "test"], "split")
        Traceback (most recent call last):
        ...
        flowback.errors.InputError: There is no split tset; did you mean test?
    """
    known = typing.get_args(choices)
    require(value in known, f"There is no {what} {value}; {nearest(str(value).lower(), map(str, known))}")


class Checked:
    """Base of frozen dataclasses: types are checked first, then :meth:`check` looks at the values."""

    section: ClassVar[str] = ""
    """Prefix of its options' names, before the dot."""

    def __post_init__(self) -> None:
        prefix = f"{self.section}." if self.section else ""
        for name, hint in _hints(type(self)).items():
            if not is_dataclass(hint):
                object.__setattr__(self, name, _value(getattr(self, name), hint, prefix + name))
        self.check()

    def check(self) -> None:
        """Raise InputError for values that do not go together, or lie out of range."""


_cache: dict[Any, dict[str, Any]] = {}


def _hints(kind: Any) -> dict[str, Any]:
    """Type of each field; cached, since every new config needs it."""
    if kind not in _cache:
        hints = typing.get_type_hints(kind)
        _cache[kind] = {field.name: hints[field.name] for field in fields(kind)}
    return _cache[kind]


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _value(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type that the field's annotation names."""
    try:
        # Python takes True for 1, and so would pydantic.
        if not isinstance(value, bool) or bool in (hint, *typing.get_args(hint)):
            checked = _adapter(hint).validate_python(value)
            if _finite(checked):
                return checked
    except ValidationError:
        pass
    typed = value.lower()[:_SHOWN] if isinstance(value, str) else ""
    close = nearest(typed, map(str, _choices(hint)), only_close=True)
    raise InputError(f"Option {where} is {_shown(value)}, which is not {_describe(hint)}{close or '.'}")


_SHOWN = 80
"""Characters of a value in a message."""


def _shown(value: Any) -> str:
    """A value of any kind and size as a message shows it."""
    if isinstance(value, (dict, list, tuple)):  # of any depth, and the same list again and again
        return shorten(_short.repr(list(value) if isinstance(value, tuple) else value), _SHOWN)
    try:
        return shorten(json.dumps(value, default=str, ensure_ascii=False), _SHOWN)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a very long {type(value).__name__}"


class _Short(reprlib.Repr):
    """Of lists in lists: Python's form, cut short."""

    def repr1(self, x: Any, level: int) -> str:
        return super().repr1(x, level) if isinstance(x, (dict, list, tuple)) else _shown(x)


_short = _Short()
_short.maxlevel, _short.maxlist, _short.maxdict = 4, 12, 6


def _finite(value: Any) -> bool:
    """Whether no number in it is infinite or NaN, which would pass most comparisons of a `check`."""
    if isinstance(value, tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _choices(hint: Any) -> list[Any]:
    """The values that a Literal, or one in a union, allows."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [choice for option in typing.get_args(hint) for choice in _choices(option)]
    return []


def to_dict(config: Any) -> Any:
    """Plain lists, dicts, strings and numbers of a config, ready for JSON."""
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def replaced(configs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """The configs with new values; each option goes to the config that has a field of that name.

    Raises:
        InputError: no config has such an option, or a value does not fit.
    """
    names = [{field.name for field in fields(config)} for config in configs]
    for option in options:
        if not any(option in known for known in names):
            raise InputError(f"There is no option {option}; {nearest(option, set().union(*names))}")
    return tuple(
        replace(config, **{option: value for option, value in options.items() if option in known})
        for config, known in zip(configs, names, strict=True)
    )


def from_dict(kind: type[T], values: Any, default: T | None = None, where: str = "") -> T:
    """The dataclass ``kind`` with ``values``; fields that they leave out come from ``default``.

    Raises:
        InputError: an unknown key, or a value that does not fit its field.
    """
    if not isinstance(values, dict):
        name = where.removesuffix(".") or kind.__name__
        raise InputError(f"{name} must be a mapping of options, not {_shown(values)}.")
    hints = _hints(kind)
    for key in values:
        if key not in hints:
            name = shorten(key) if isinstance(key, str) else _shown(key)
            raise InputError(f"Unknown option {where}{name}; {nearest(name, hints)}")
    arguments = {}
    for name, hint in hints.items():
        if name not in values:
            if default is not None:
                arguments[name] = getattr(default, name)
        elif is_dataclass(hint):
            base = getattr(default, name) if default is not None else None
            arguments[name] = from_dict(typing.cast(type, hint), values[name], base, f"{where}{name}.")
        else:
            arguments[name] = _value(values[name], hint, f"{where}{name}")
    return kind(**arguments)


def _describe(hint: Any) -> str:
    """A type annotation in words, for an error message."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_describe(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_describe, arguments))}]"
    names = {type(None): "None", float: "a finite number"}
    return names.get(hint) or str(hint.__name__)
