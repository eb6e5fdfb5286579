import errno
import json
import subprocess
import sys

import pytest

from flowback import __version__
from flowback.cli import VERBS
from flowback.errors import Interrupted, ProcessLostError


def test_help_lists_every_verb(flowback):
    code, out, _ = flowback("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


def test_version(flowback):
    assert flowback("--version") == (0, f"flowback {__version__}\n", "")


def test_no_verb_shows_the_usage_and_fails(flowback):
    assert flowback()[0] == 2


def test_unknown_verb_names_the_nearest(flowback):
    code, _, err = flowback("trian")
    assert code == 2
    assert err == "flowback: There is no verb 'trian'; did you mean train?\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(flowback, verb):
    code, out, _ = flowback(verb, "--help")
    assert code == 0
    assert f"usage: flowback {verb}" in out


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["trian"]])
def test_what_needs_no_verb_loads_no_library(words):
    """A process with PyTorch and NumPy takes seconds to start; this is Python and two small modules."""
    code = (
        f"import sys; from flowback.cli import main; main({words}); import flowback\n"
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'pydantic', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_record_that_cannot_be_written_is_said_at_the_start(flowback, tmp_path):
    (tmp_path / "file").write_text("something else")
    words = ("demo", "--steps", 1, "--out", tmp_path / "out")
    code, out, err = flowback(*words, "--json", tmp_path)
    assert (code, out, err) == (2, "", f"flowback: --json {tmp_path} is a folder; give the name of a file.\n")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_a_folder_is_one_sentence(flowback, tmp_path):
    (tmp_path / "file").write_text("something else")
    record = tmp_path / "file" / "presets.json"
    code, out, err = flowback("presets", "--json", record)
    assert (code, out) == (2, "")
    assert err == f"flowback: --json {record} cannot be written: {tmp_path / 'file'} is not a folder.\n"
    assert (tmp_path / "file").read_text() == "something else"


def test_python_m_flowback():
    done = subprocess.run(
        [sys.executable, "-m", "flowback", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"flowback {__version__}\n"


def test_presets_lists_all_with_published_numbers(flowback, tmp_path):
    code, out, _ = flowback("presets", "--json", tmp_path / "presets.json")
    assert code == 0
    assert "digits-mini" in out
    rows = {row["name"]: row for row in json.loads((tmp_path / "presets.json").read_text())["presets"]}
    assert rows["imagenet64-reverse"]["published"]["fid"] == 11.71
    # 8 blocks of 8 layers of 12 · 1024² weights, and little else.
    assert rows["imagenet64"]["parameters"] == pytest.approx(64 * 12 * 1024**2, rel=0.02)
    assert rows["imagenet64"]["flops_per_image"] == pytest.approx(2 * 256 * 64 * 12 * 1024**2, rel=0.1)


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (
            Interrupted("Stopped by signal 15"),
            75,
            "Stopped by signal 15. Run the same command again to continue.",
        ),
        (ProcessLostError("A process is gone"), 74, "run the same command again to continue."),
    ],
)
def test_a_run_that_was_stopped_says_how_it_goes_on(flowback, monkeypatch, stop, code, said):
    def stopped(argv):
        raise stop

    monkeypatch.setattr("flowback.cli.demo.run", stopped)
    found, _, err = flowback("demo")
    assert found == code
    assert err.startswith(f"flowback: {stop}")
    assert err.endswith(f"{said}\n")


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.EACCES, "a.npy cannot be used: Permission denied; change that, or choose another place."),
        (
            errno.ENOSPC,
            "a.npy cannot be written: No space left on device; make room, or choose another place.",
        ),
    ],
)
def test_a_file_that_may_not_be_read_is_no_full_disk(flowback, monkeypatch, number, sentence):
    def run(argv):
        raise OSError(number, "", "a.npy")

    monkeypatch.setattr("flowback.cli.list_presets.run", run)
    assert flowback("presets") == (2, "", f"flowback: {sentence}\n")
