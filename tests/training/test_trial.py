"""What a dry run says of memory, against what a run takes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import runs
from flowback.config import AlignmentConfig
from flowback.training import trial, try_run

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


class Encoder(SimpleNamespace):
    """As far as a trial with a replaced timer looks at it."""

    def to(self, device):
        return self


@pytest.mark.parametrize(
    ("aligned", "table", "step", "before"),
    [(False, True, 2.0, 0.0), (True, True, 2.0, 0.5), (True, False, 2.5, 0.0)],
    ids=["likelihood", "table", "every-step"],
)
def test_time_counts_the_encoder_once(monkeypatch, aligned, table, step, before):
    """2 s an image in a step, 0.5 s in the encoder: before the first step with a table, else in each step."""
    monkeypatch.setattr(trial, "_timed", lambda *_: (2.0, 0.5 if aligned else 0.0))
    monkeypatch.setattr(trial, "create_encoder", lambda *_: Encoder(dim=4))
    monkeypatch.setattr(trial, "without_table", lambda *_: None if table else "a reason")
    config = runs.tiny_config()
    alignment = AlignmentConfig(strategy="detach", locations=((1, 1),)) if aligned else AlignmentConfig()
    data = replace(config.data, flip=True)
    seen = try_run(replace(config, alignment=alignment, data=data))
    assert seen.step_seconds == config.train.batch_size * step
    assert seen.encoder_seconds == 2 * len(seen.images) * before
    assert seen.seconds == seen.encoder_seconds + config.train.steps * seen.step_seconds
