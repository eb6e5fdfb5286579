"""``flowback completion``: a script that lets the shell complete verbs, options and their values."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro

from flowback.cli import VERBS
from flowback.cli.console import say
from flowback.cli.options import parse
from flowback.presets import PRESETS, TABLES

__all__ = ["Options", "choices", "run", "script"]

Shell = Literal["bash", "zsh", "fish"]
Choices = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Options:
    """Print a script for the shell's completion of verbs, options and their values.

    bash, in ~/.bashrc: `source <(flowback completion bash)`. zsh, in ~/.zshrc: `source <(flowback completion
    zsh)`. fish: `flowback completion fish > ~/.config/fish/completions/flowback.fish`.
    """

    shell: tyro.conf.Positional[Shell]
    """The shell."""


NAMES = {
    "train": tuple(PRESETS),
    "presets": tuple(PRESETS),
    "reproduce": tuple(TABLES),
    "completion": get_args(Shell),
}
"""What the words of a verb that are no options may be, where it is not files and folders."""


def run(argv: list[str]) -> None:
    """Print the script."""
    say(script(parse(Options, argv, "completion").shell))


def script(shell: Shell) -> str:
    """The script for a shell, with the options of all verbs as they are now."""
    known = {verb: choices(verb) for verb in VERBS}
    if shell == "fish":
        return "\n".join(_fish(known))
    begin = ["autoload -Uz compinit bashcompinit && compinit && bashcompinit"] if shell == "zsh" else []
    return "\n".join([*begin, *_bash(known)])


def choices(verb: str) -> Choices:
    """The values that each option of a verb takes; none where any text is allowed.

    Example:
        >>> choices("cache")
        {'--help': (), '--clear': ()}
    """
    module, function = VERBS[verb][0].split(":")
    kind = f"{function.removeprefix('run').strip('_').title()}Options"
    return {"--help": (), **_choices(getattr(importlib.import_module(f"flowback.cli.{module}"), kind), "--")}


def _choices(kind: type[Any], prefix: str) -> Choices:
    """Those of a class of options, as tyro names them."""
    found: Choices = {}
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        hint: Any = hints[one.name]
        marks: tuple[Any, ...] = ()
        while hasattr(hint, "__metadata__"):
            hint, marks = hint.__origin__, (*marks, *hint.__metadata__)
        name = prefix + one.name.replace("_", "-")
        if is_dataclass(hint):
            plain = tyro.conf.OmitArgPrefixes in marks or any(
                getattr(mark, "name", None) == "" for mark in marks
            )
            found |= _choices(cast(type[Any], hint), prefix if plain else f"{name}.")
        elif tyro.conf.FlagCreatePairsOff in marks:
            found[name] = ()
        elif hint is bool:
            found |= {name: (), f"{prefix}no-{one.name.replace('_', '-')}": ()}
        elif not {tyro.conf.Positional, tyro.conf.Suppress} & set(marks):
            found[name] = tuple(_values(hint))
    return found


def _values(hint: Any) -> Iterator[str]:
    """The values of a Literal, also of one in a tuple or a union."""
    if get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif get_origin(hint) is not None:
        for part in get_args(hint):
            yield from _values(part)


def _bash(known: dict[str, Choices]) -> Iterator[str]:
    """A function that looks at the verb and at the word before; files where it finds nothing."""
    yield "_flowback() {"
    yield "  local verb=${COMP_WORDS[1]} word=${COMP_WORDS[COMP_CWORD]} words="
    yield "  local before=${COMP_WORDS[COMP_CWORD-1]}"
    yield f'  if [ "$COMP_CWORD" -eq 1 ]; then words="{" ".join([*known, "--help", "--version"])}"'
    yield '  else case "$verb $before" in'
    for verb, options in known.items():
        for option, values in options.items():
            if values:
                yield f'    "{verb} {option}") words="{" ".join(values)}" ;;'
    yield '    *) case "$verb $word" in'
    for verb, options in known.items():
        yield f'      "{verb} -"*) words="{" ".join(options)}" ;;'
        if verb in NAMES:
            yield f'      "{verb} "*) [[ $before == --* ]] || words="{" ".join(NAMES[verb])}" ;;'
    yield "    esac ;;"
    yield "  esac; fi"
    yield '  COMPREPLY=($(compgen -W "$words" -- "$word"))'
    yield "}"
    yield "complete -o default -F _flowback flowback"


def _fish(known: dict[str, Choices]) -> Iterator[str]:
    """A line for each verb and each option."""
    for verb in known:
        quoted = VERBS[verb][1].replace("\\", "\\\\").replace("'", "\\'")
        yield f"complete -c flowback -n __fish_use_subcommand -f -a {verb} -d '{quoted}'"
    for verb, options in known.items():
        after = f"complete -c flowback -n '__fish_seen_subcommand_from {verb}'"
        if verb in NAMES:
            yield f"{after} -a '{' '.join(NAMES[verb])}'"
        for option, values in options.items():
            yield f"{after} -l {option[2:]}" + (f" -x -a '{' '.join(values)}'" if values else "")
