"""A disk that is full, and a folder that may not be written: one sentence, and what was saved stands."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest

import runs
from flowback import checkpoint

pytestmark = pytest.mark.faults

OPTIONS = """--train.steps 4 --train.save-every 2 --train.log-every 2 --train.eval-every 4
    --train.eval-images 8 --train.device cpu""".split()  # noqa: SIM905 - options as they are typed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("disk")
    words = ("train", "digits-mini", "--out", str(folder / "run"), *OPTIONS)
    assert runs.run(runs.command, *words, log=folder / "log") == [0], runs.printed(folder / "log")
    return folder / "run"


@pytest.mark.parametrize(
    ("size", "what"),
    [(500, "environment.json"), (20_100, "metrics.jsonl"), (60_000, "step-06"), (250_000, "step-06")],
    ids=["start", "metrics", "weights", "training state"],
)
def test_a_full_disk(saved, tmp_path, size, what):
    shutil.copytree(saved, tmp_path / "run")
    files = [file.stat().st_size for file in checkpoint.resolve(saved).iterdir()]
    assert sorted(files)[-2] > 60_000  # else the limits do not fall where their names say
    assert sorted(files)[-1] > 250_000
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # a row that no other file is as long as
        file.write(json.dumps({"step": 4, "long": "x" * 19_000}) + "\n")
    words = ("train", "digits-mini", "--out", str(tmp_path / "run"), *OPTIONS, "--train.steps", "6")
    codes = runs.run(functools.partial(runs.limited, size), *words, log=tmp_path / "log")
    printed = runs.printed(tmp_path / "log")
    said = [line for line in printed.splitlines() if "cannot be written" in line]
    assert codes == [2], printed
    assert "Traceback" not in printed
    assert len(said) == 1
    assert what in said[0].replace("step-000000", "step-")
    assert "make room" in said[0]
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [
        folder.name for folder in (saved / "checkpoints").iterdir()
    ]
    assert runs.run(runs.command, *words, log=tmp_path / "log") == [0], runs.printed(tmp_path / "log")
    assert checkpoint.resolve(tmp_path / "run").name == "step-00000006"


def test_a_read_only_folder(config):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others as a whole
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0o555)
        out = folder / "closed" / "run"
        codes = runs.run(runs.unprivileged, config, folder / "before", out, log=folder / "log")
        said = runs.printed(folder / "log")
    assert codes == [2], said
    assert said == f"--out {out} cannot be written: Permission denied; choose another folder.\n"
