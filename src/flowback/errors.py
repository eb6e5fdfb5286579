"""The one error that a user can mend: wrong options, files or data.

The command line prints its text as a single sentence and exits with code 2; every other exception
is a defect of flowback and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "nearest"]


class InputError(Exception):
    """Bad input. The message names the file or option and says what to do about it.

    Not a ValueError: the option parser would catch that and frame it in text of its own.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that lists the known names closest to ``name``, for the end of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}"
