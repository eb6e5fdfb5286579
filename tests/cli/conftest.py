import os
import sys

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from flowback.cli import main

SMALL = """
    --model.width 16 --model.head-dim 8 --model.blocks 2 --model.layers 1
    --train.batch-size 8 --train.steps 4 --train.warmup-steps 1 --train.device cpu
    --train.log-every 2 --train.save-every 2 --train.eval-every 4 --train.eval-images 8
    --alignment.locations 2 1 --alignment.hidden 8
""".split()  # noqa: SIM905 - options as they are typed


@pytest.fixture
def flowback(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # the option parser's own exit
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def launched():
    """Arguments and environment of a command in two processes, as ``subprocess`` takes them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def two(*words):
        command = [*launcher, "-m", "flowback", *map(str, words)]
        return {"args": command, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}

    return two


@pytest.fixture
def small():
    """Options that bring any preset down to seconds."""
    return SMALL


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of real colour photographs: crops of scikit-learn's two pictures, one class each."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("china", "flower"):
        picture = load_sample_image(f"{name}.jpg")
        (folder / name).mkdir()
        for index in range(24):
            top, left = 40 * (index // 6), 90 * (index % 6)
            Image.fromarray(picture[top : top + 96, left : left + 128]).save(
                folder / name / f"{index:02d}.jpg"
            )
    return folder
