"""Exceptions that end a command and are not bugs; a bug keeps its traceback.

The command line prints an :class:`InputError` as one sentence and exits with code 2. If a run was stopped or
lost a process, it says that the same command continues the run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["InputError", "Interrupted", "ProcessLostError", "is_utf8", "nearest", "printable", "shorten"]


class InputError(Exception):
    """Bad input. The message names the file or option and says what to do about it.

    Not a ValueError: the option parser would catch that and frame it in text of its own.
    """


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """The run was asked to stop by SIGINT or SIGTERM; its state is saved."""


class ProcessLostError(Exception):
    """Another process of the run died. Started again, the run continues from its last checkpoint."""


def nearest(name: str, known: Iterable[str], only_close: bool = False) -> str:
    """A hint that lists the known names closest to ``name``, for the end of an error message.

    If none is close, it lists all of them. With ``only_close`` the hint begins with "; ", and is empty if
    none is close.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else ""
    if only_close:
        return hint and f"; {hint}"
    return hint or f"known: {', '.join(known)}"


def is_utf8(name: str) -> bool:
    """Whether a file's name is text; odd bytes in one become surrogates, which no file of text can hold."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def printable(text: str) -> str:
    r"""Text with escapes for what no terminal and no file of UTF-8 should get: control characters, odd bytes.

    Example:
        >>> print(printable("two\nlines, caf\udce9"))
        two\nlines, caf\udce9
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: repr(found[0])[1:-1], text)


def shorten(text: str, length: int = 80) -> str:
    """The first line of a text, printable, and not much longer than ``length``.

    Example:
        >>> shorten("a" * 100, 10)
        'aaaaaaaaaa...'
    """
    line = printable((text.strip().splitlines() or [""])[0])
    return line if len(line) <= length else f"{line[:length]}..."
