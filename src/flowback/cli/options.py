"""Reading the options of a verb, and where results go."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from flowback.cli.console import wrapped
from flowback.errors import InputError
from flowback.files import check_file, check_folder

__all__ = [
    "LEVELS",
    "SEARCH",
    "default_folder",
    "guidance_scales",
    "is_checkpoint",
    "names_flow",
    "noise_levels",
    "out_folder",
    "parse",
]

Options = TypeVar("Options")


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is the folder of a checkpoint or of a run."""
    from flowback import checkpoint

    return (path / "config.json").is_file() or bool(checkpoint.step_folders(path))


def names_flow(name: Path) -> bool:
    """Whether ``name`` is such a folder, a flow that comes with the package, or one on the Hub.

    Raises:
        InputError: it can only be a name on the Hub, and cannot be had from there.
    """
    from flowback import checkpoint

    return is_checkpoint(checkpoint.fetch(name))


def parse(
    kind: type[Options],
    argv: Sequence[str],
    verb: str,
    defaults: Callable[[Any], dict[str, Any]] | None = None,
) -> Options:
    """Options of ``kind`` from the command line, in any order.

    Defaults may depend on what is given (a preset, a checkpoint, a file of settings), so the words are read
    twice: first without checks, to see what is given, then with the defaults that follow from it. An option
    with many values takes all words up to the next option, even the positional right after it (``--labels 1
    2 RUN --out x``); the positional is then missing, which is refused, unless it is the last word of all.
    ``--data NAME`` and ``--data FOLDER`` are short for ``--data.name`` and ``--data.path``.

    Args:
        kind: dataclass of the options; a default for each but the required ones.
        argv: the words after the verb.
        verb: for usage and messages.
        defaults: fields of ``kind`` by name, given what the first reading saw; left out, the data are those
            of the checkpoint that is the first positional.

    Raises:
        InputError: values out of range, a ``--json`` that cannot be written, or what ``defaults`` raises.
    """
    has_data = "data" in _groups(kind)
    words = _without_shorthand(argv) if has_data else list(argv)
    helps = bool({"-h", "--help"} & set(itertools.takewhile(lambda word: word != "--", words)))
    overrides: dict[str, Any] = {}
    read = [word for word in words if word not in ("-h", "--help")]
    if (defaults or has_data) and (read or not helps):
        try:
            seen = _read(_unchecked(kind), read, verb, console_outputs=not helps)
            overrides = (defaults or _data_of_checkpoint)(seen)
        except SystemExit:  # something is missing or misspelled, as tyro has said
            if not helps:
                raise
    if helps:
        words = ["--help"]  # alone: tyro's help leaves out the positionals before it
    start = _start(kind, overrides)
    about = {"description": _about(kind)} if helps else {}
    options = _read(kind, words, verb, default=start, **about)
    record = getattr(options, "json", None)  # known now, not when the work is done
    if record is not None:
        check_file(record, "--json")
    return options


def _read(kind: type[Options], words: Sequence[str], verb: str, **options: Any) -> Options:
    return tyro.cli(kind, args=words, prog=f"flowback {verb}", registry=_REGISTRY, **options)


def _about(kind: type[Any]) -> str:
    """What the verb does, in lines that fit; tyro joins those that do not begin with a space."""
    paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    return "\n".join("\n".join(wrapped(f" {paragraph}", indent=1)) for paragraph in paragraphs)


def _data_of_checkpoint(seen: Any) -> dict[str, Any]:
    """The data of the checkpoint that the first field names; nothing where it names none."""
    from flowback import checkpoint

    folder = checkpoint.fetch(getattr(seen, fields(seen)[0].name))
    return {"data": checkpoint.load_config(folder).data} if is_checkpoint(folder) else {}


def _unchecked(kind: type[Any]) -> type[Any]:
    """The same options without checks of their values: the defaults may not fit yet."""
    groups = {name: _unchecked(group) for name, group in _groups(kind).items()}
    written = get_type_hints(kind, include_extras=True)
    marks = {name: getattr(written[name], "__metadata__", ()) for name in groups}  # tyro's
    body = {name: field(default_factory=group) for name, group in groups.items()}
    hints = {name: Annotated[group, *marks[name]] if marks[name] else group for name, group in groups.items()}
    body |= {"__annotations__": hints, "__post_init__": lambda _: None, "__doc__": kind.__doc__}
    return dataclass(frozen=True)(type(kind.__name__, (kind,), body))


def _start(kind: type[Options], given: dict[str, Any]) -> Options:
    """The defaults that tyro starts from; not constructed, which would check the marks of missing values."""
    start = object.__new__(kind)
    for one in fields(kind):  # type: ignore[arg-type]
        if one.name in given:
            value = given[one.name]
        elif one.default_factory is not MISSING:
            value = one.default_factory()
        else:
            value = tyro.MISSING if one.default is MISSING else one.default
        object.__setattr__(start, one.name, value)
    return start


def _groups(kind: type[Any]) -> dict[str, Any]:
    """The options that are groups of options, by name."""
    return {name: hint for name, hint in get_type_hints(kind).items() if is_dataclass(hint)}


def _without_shorthand(argv: Sequence[str]) -> list[str]:
    """``--data VALUE`` written out; a set by name does without the checkpoint's path, unless one is given."""
    path_given = any(word.split("=")[0] == "--data.path" for word in argv)
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--data":
            words[-1:] = _shorthand(word, path_given)
        elif word.startswith("--data="):
            words += _shorthand(word.removeprefix("--data="), path_given)
        else:
            words.append(word)
    return words


def _shorthand(value: str, path_given: bool) -> list[str]:
    from flowback.data.named_sets import dataset_names

    if value not in dataset_names():
        return ["--data.name", "folder", "--data.path", value]  # a prepared set is recognised there
    return ["--data.name", value, *(() if path_given else ("--data.path", "None"))]


def default_folder(kind: str, name: Path) -> Path:
    """Where what is made of a flow goes, if not told: ``kind``/its name, in the present folder."""
    return Path(kind, name.resolve().name.replace("@", "-"))


def out_folder(out: Path | None, subject: Path) -> Path:
    """The folder of records and pictures, checked before the work: as asked, or beside the checkpoint.

    Those of a flow that comes with flowback or from the Hub go to ``evaluation/NAME`` in the present folder.

    Raises:
        InputError: it cannot be written, or ``subject`` is no checkpoint.
    """
    folder = out or subject / "evaluation"
    if out is None and not is_checkpoint(subject):
        from flowback import checkpoint

        checkpoint.resolve(checkpoint.fetch(subject))
        folder = default_folder("evaluation", subject)
    check_folder(folder, "--out")
    return folder


def guidance_scales(text: str) -> tuple[float, ...]:
    """The guidance scales that ``FIRST:LAST:STEP`` means, both ends included; a number is itself.

    Raises:
        InputError: neither of the two.

    Example:
        >>> guidance_scales("1.0:2.0:0.5")
        (1.0, 1.5, 2.0)
    """
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if len(parts) == 1:
        return tuple(parts)
    if len(parts) != 3 or parts[2] <= 0 or parts[1] < parts[0]:
        raise InputError(f"--search {text} is neither a number nor FIRST:LAST:STEP, such as 1.0:4.0:0.5.")
    first, last, step = parts
    count = int((last - first) / step + 1e-9) + 1  # 1e-9: the last one is included despite rounding
    return tuple(round(first + index * step, 10) for index in range(count))


SEARCH = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="FIRST:LAST:STEP",
    instance_from_str=lambda words: guidance_scales(words[0]),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [":".join(map(str, value)) or "none"],
)
"""How guidance scales to try are typed."""


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _one_or_several(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[int | tuple[int, ...]] | None:
    """A number, or one a block: ``8`` or ``4,4,4,24``."""
    if info.type != int | tuple[int, ...]:
        return None

    def read(words: list[str]) -> int | tuple[int, ...]:
        numbers = tuple(map(int, words[0].split(",")))
        return numbers if len(numbers) > 1 else numbers[0]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT[,INT,...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (int, tuple)),
        str_from_instance=lambda value: [",".join(map(str, value if isinstance(value, tuple) else (value,)))],
    )


def noise_levels(text: str) -> tuple[float, ...]:
    """The noise levels that numbers with commas between them mean.

    Raises:
        InputError: no such numbers, or the same twice.

    Example:
        >>> noise_levels("0.1,0.2")
        (0.1, 0.2)
    """
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--noise {text} are no numbers with commas between, such as 0.1,0.2,0.3.") from None
    if len(set(levels)) < len(levels):
        raise InputError(f"--noise {text} repeats a level; give each once.")
    return levels


LEVELS = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="LEVEL,LEVEL,...",
    instance_from_str=lambda words: noise_levels(words[0]),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [",".join(f"{level:g}" for level in value) or "training"],
)
"""How noise levels are typed."""
