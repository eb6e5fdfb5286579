"""The examples run as they are, for a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((EXAMPLES / "own_loop.py", 2), "training-free accuracy: "),
        ((EXAMPLES / "per_sample_gradients.py",), "norm of each image's gradient: "),
        ((*TORCHRUN, EXAMPLES / "ddp.py", 2), "2 steps of 2 processes; all have the same weights: True"),
    ],
    ids=["own_loop", "per_sample_gradients", "ddp"],
)
def test_an_example_runs(words, said, tmp_path):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_reverse_alignment_takes_at_most_forty_lines():
    assert len((EXAMPLES / "own_loop.py").read_text().splitlines()) <= 40
