"""Tables: whole names on a narrow terminal, plain lines in a pipe."""

import io
import os
import re
import subprocess
import sys

import pytest

from flowback import presets
from flowback.cli.console import say, show_table


def plain(text):
    """Without codes for bold and colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class Terminal(io.StringIO):
    """What a terminal shows."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Print on a terminal of a given width."""

    def show(width, *arguments, colours=False, **options):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", Terminal())
        show_table(*arguments, **options)
        text = sys.stdout.getvalue()
        return text if colours else plain(text)

    return show


NAME = "imagenet64-reverse-of-a-long-name"
ROWS = [[NAME, "a sentence of several words that wraps", 0.123456, None], ["short", "b [red]c", 2.0, 17]]
COLUMNS = ["name", "about", "value", "a count"]


@pytest.mark.parametrize("width", [200, 80, 66, 40, 20])
def test_names_and_words_are_whole_at_any_width(terminal, width):
    text = terminal(width, "Title", COLUMNS, ROWS)
    assert text.startswith("Title\n")
    assert NAME in text
    assert all(word in text for row in ROWS for word in str(row[1]).split())
    assert "0.1235" in text
    assert "…" not in text
    if width >= 66:
        assert max(map(len, text.splitlines())) <= width


def test_too_narrow_a_terminal_shows_row_by_row(terminal):
    lines = terminal(40, "Title", COLUMNS, ROWS).splitlines()
    assert lines[:5] == [
        "Title",
        f"name     {NAME}",
        "about    a sentence of several words that wraps",
        "value    0.1235",
        "a count  –",
    ]


def test_optional_columns_are_left_out_by_name(terminal):
    text = terminal(50, "Title", COLUMNS, ROWS, optional=3, note="A note.")
    assert NAME in text
    assert "0.1235" not in text
    assert text.endswith("Not shown (narrow terminal): value, a count.\nA note.\n")
    assert "Not shown" not in terminal(200, "Title", COLUMNS, ROWS, optional=3)


def test_no_color_is_respected(terminal, monkeypatch):
    assert "\x1b[" in terminal(200, "Title", COLUMNS, ROWS, colours=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in terminal(200, "Title", COLUMNS, ROWS, colours=True)


def test_a_pipe_gets_one_line_a_row(capsys):
    show_table("Title", COLUMNS, [*ROWS, ["two\nlines", "a\tb", 1, 2]], optional=3, note="A note.")
    assert capsys.readouterr().out.splitlines() == [
        "# Title",
        "# name\tabout\tvalue\ta count",
        f"{NAME}\ta sentence of several words that wraps\t0.1235\t–",
        "short\tb [red]c\t2\t17",
        "two lines\ta b\t1\t2",
        "# A note.",
    ]


def test_a_line_is_printed_as_it_is(capsys):
    say("[bold] " + "long " * 100)
    assert capsys.readouterr().out == "[bold] " + "long " * 100 + "\n"


def test_presets_in_a_pipe_begin_with_their_names(flowback):
    _, out, _ = flowback("presets")
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    assert [line.split("\t")[0] for line in lines] == list(presets.PRESETS)


def test_presets_on_eighty_columns_keep_their_names(flowback, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    flowback("presets")
    text = plain(screen.getvalue())
    assert all(f" {name} " in text for name in presets.PRESETS)
    assert max(map(len, text.splitlines()[1:-1])) <= 80


def test_presets_by_pattern(flowback):
    code, out, _ = flowback("presets", "imagenet64*")
    names = [line.split("\t")[0] for line in out.splitlines() if not line.startswith("#")]
    assert code == 0
    assert names == presets.list_presets("imagenet64*")
    assert "imagenet64-reverse" in names
    assert "digits" not in names
    code, out, err = flowback("presets", "imagenet46*")
    assert (code, out) == (2, "")
    assert err.startswith("flowback: No preset matches 'imagenet46*'; did you mean imagenet")


def test_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m flowback presets | head -n 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert done.stdout == "# Presets\n"
    assert done.stderr == ""


def test_help_that_nobody_reads_to_its_end_is_no_traceback():
    """`head` ends after one line, while tyro still prints the rest, piece by piece."""
    command = f"{sys.executable} -m flowback train --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: flowback train")
    assert done.stderr == ""
