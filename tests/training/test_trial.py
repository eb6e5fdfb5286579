"""What a dry run says of memory, against what a run takes."""

import subprocess
import sys
from pathlib import Path

TRY_AND_TRAIN = """
import sys, torch, runs, flowback
from flowback.training import try_run
torch.set_num_threads(1)
config = runs.tiny_config()
print(try_run(config).memory, flowback.train(config, out=sys.argv[1]).metrics["peak_memory"])
"""


def test_memory_is_that_of_a_run(tmp_path):
    """Within 1.2, in a process that has loaded nothing yet: a run of its own loads libraries on its way."""
    done = subprocess.run(
        [sys.executable, "-c", TRY_AND_TRAIN, tmp_path / "run"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    estimated, taken = map(int, done.stdout.split())
    assert taken / 1.2 < estimated < taken * 1.2
