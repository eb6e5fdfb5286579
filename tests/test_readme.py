"""The README's commands and examples run, in their order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(
    r"(?:<!-- not run by the tests: (?P<reason>.+?) -->\s*\n)?"
    r"^```(?P<language>sh|python)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> list[tuple[str, str, str | None]]:
    """(language, code, reason not to run it) of every block of commands or Python."""
    return [(found["language"], found["code"], found["reason"]) for found in BLOCK.finditer(text)]


def test_blocks_and_their_marks_are_found():
    text = (
        "# A\n\n```sh\nls\n```\n\nWords.\n\n"
        "<!-- not run by the tests: it takes a day -->\n```sh\nflowback train\n```\n"
        "```text\nnot code\n```\n\n```python\nimport flowback\n```\n"
    )
    assert blocks(text) == [
        ("sh", "ls\n", None),
        ("sh", "flowback train\n", "it takes a day"),
        ("python", "import flowback\n", None),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


def name(block: tuple[str, str, str | None]) -> str:
    return block[1].strip().splitlines()[0][:60]


@pytest.mark.parametrize("block", blocks(README.read_text()), ids=name)
def test_readme(block, folder):
    language, code, reason = block
    if reason:
        pytest.skip(reason)
    # One thread: the models are tiny, and the other tests run at the same time.
    threads = {"OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
