"""What the verbs print on stdout: lines and tables, for people on a terminal and for programs in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["say", "show_table"]


def say(text: str) -> None:
    """Print one line."""
    _write(f"{text}\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], optional: int = 0) -> None:
    """Print a table; floats are shortened to four digits.

    On a terminal, numbers are right-aligned, the first column stays whole and the others wrap between words;
    a table that is too wide even so is printed row by row. In a pipe there is one line for each row, with tabs
    between the columns, after title and columns on lines that begin with ``#``.

    Args:
        title: printed above.
        columns: their names.
        rows: a value for each column; None is shown as a dash.
        optional: so many columns, from the right, may be left out where the terminal is too narrow.
    """
    texts = [[_text(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        lines = [f"# {title}", "# " + "\t".join(columns), *("\t".join(row) for row in texts)]
        _write("".join(f"{line}\n" for line in lines))
        return
    console = Console(highlight=False)
    cells = list(zip(columns, *texts, strict=True))  # by column, the name first
    needed = [_needed(column, whole=index == 0) for index, column in enumerate(cells)]
    shown = len(columns)
    while optional and not _fits(needed[:shown], console.width):
        shown, optional = shown - 1, optional - 1
    if not _fits(needed[:shown], console.width):
        _write(f"{title}\n{_row_by_row(columns, texts)}")
        return
    table = Table()
    for index, column in enumerate(columns[:shown]):
        numeric = all(isinstance(row[index], (int, float)) or row[index] is None for row in rows)
        table.add_column(
            column, justify="right" if numeric else "left", min_width=needed[index], no_wrap=index == 0
        )
    for row in texts:
        table.add_row(*row[:shown])
    with console.capture() as printed:
        console.print(table, markup=False)
    _write(f"{title}\n{printed.get()}")
    if shown < len(columns):
        _write(f"Not shown on {console.width} columns: {', '.join(columns[shown:])}.\n")


def _needed(cells: Sequence[str], whole: bool) -> int:
    """Width of a column: of its longest cell, or of the longest word that wrapping leaves whole."""
    return max(len(part) for cell in cells for part in ([cell] if whole else cell.split() or [""]))


def _fits(widths: Sequence[int], width: int) -> bool:
    """Whether columns fit on the terminal, with a border and two spaces for each."""
    return sum(widths) + 3 * len(widths) + 1 <= width


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
    except BrokenPipeError:  # whoever reads, `head` say, has seen enough; the work goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
