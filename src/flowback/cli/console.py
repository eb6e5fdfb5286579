"""What the verbs print on stdout: lines and tables, for people on a terminal and for programs in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ["columns", "discard_output", "say", "show_table", "wrapped"]


def say(text: str) -> None:
    """Print one line."""
    _write(f"{text}\n")


def columns() -> int:
    """Width of text on this terminal; at most 100, since longer lines are hard to read."""
    return min(max(shutil.get_terminal_size().columns, 40), 100)


def wrapped(text: str, indent: int = 0) -> list[str]:
    """A paragraph in lines that fit; all but the first are indented."""
    return textwrap.wrap(text, columns(), subsequent_indent=" " * indent, break_on_hyphens=False)


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], optional: int = 0, note: str = ""
) -> None:
    """Print a table; floats are shortened to four digits.

    On a terminal, numbers are right-aligned, the first column stays whole and the others wrap between
    words; a table that is still too wide is printed row by row. In a pipe there is one line for each row,
    with tabs between the columns; all other lines begin with ``#``.

    Args:
        title: printed above.
        columns: their names.
        rows: a value for each column; None is shown as a dash.
        optional: how many columns, from the right, may be left out if the terminal is too narrow.
        note: printed below.
    """
    texts = [[_text(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        lines = [f"# {title}", "# " + "\t".join(columns), *("\t".join(row) for row in texts)]
        lines += [f"# {note}"] if note else []
        _write("".join(f"{line}\n" for line in lines))
        return
    from rich.console import Console  # slow to import: help and pipes do without
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    cells = list(zip(columns, *texts, strict=True))  # by column, the name first
    needed = [_needed(column, whole=index == 0) for index, column in enumerate(cells)]
    shown = len(columns)
    while optional and _spare(needed[:shown], console.width) < 0:
        shown, optional = shown - 1, optional - 1
    if _spare(needed[:shown], console.width) >= 0:
        table = Table()
        widths = _widths(cells[:shown], needed[:shown], console.width)
        for index, column in enumerate(columns[:shown]):
            numeric = all(isinstance(row[index], (int, float)) or row[index] is None for row in rows)
            table.add_column(column, justify="right" if numeric else "left", width=widths[index])
        for row in texts:
            table.add_row(*map(Text, row[:shown]))  # as it is: brackets are no markup
        with console.capture() as printed:
            console.print(table)
        body = printed.get()
    else:
        body = _row_by_row(columns, texts)
    missing = columns[shown:]
    hidden = f"Not shown (narrow terminal): {', '.join(missing)}.\n" if missing else ""
    _write(f"{title}\n{body}{hidden}" + (f"{note}\n" if note else ""))


def _needed(cells: Sequence[str], whole: bool) -> int:
    """Width of a column: of its longest cell, or of the longest word that wrapping leaves whole."""
    return max(len(part) for cell in cells for part in ([cell] if whole else cell.split() or [""]))


def _spare(widths: Sequence[int], width: int) -> int:
    """What columns leave of the terminal, with a border and two spaces for each; negative: too wide."""
    return width - sum(widths) - 3 * len(widths) - 1


def _widths(cells: Sequence[Sequence[str]], needed: Sequence[int], width: int) -> list[int]:
    """What each column needs; then the spare width goes to the columns that lack least, first."""
    widths, spare = list(needed), _spare(needed, width)
    lacking = [max(map(len, column)) - least for column, least in zip(cells, needed, strict=True)]
    for index in sorted(range(len(widths)), key=lacking.__getitem__):
        more = min(lacking[index], spare)
        widths[index], spare = widths[index] + more, spare - more
    return widths


def _row_by_row(columns: Sequence[str], texts: Sequence[Sequence[str]]) -> str:
    """Each row as a paragraph, a line for each column."""
    width = max(map(len, columns))
    return "\n".join(
        "".join(f"{column:<{width}}  {text}\n" for column, text in zip(columns, row, strict=True))
        for row in texts
    )


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the work continues
        discard_output()


def discard_output() -> None:
    """Print nowhere from now on: the reader (`head`, say) closed the pipe; the last flush must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
