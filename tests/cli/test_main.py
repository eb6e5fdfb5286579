import errno
import json
import subprocess
import sys

import pytest

from flowback import __version__
from flowback.cli import TASKS, VERBS
from flowback.errors import Interrupted, ProcessLostError


def test_help_lists_every_verb(flowback):
    code, out, _ = flowback("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


def test_version(flowback):
    assert flowback("--version") == (0, f"flowback {__version__}\n", "")


def test_no_verb_shows_what_people_do_and_fails(flowback):
    code, out, err = flowback()
    assert (code, err) == (2, "")
    assert all(f"{task} " in out and example in out for task, (example, _) in TASKS.items())


def test_examples_and_groups_name_verbs_that_exist():
    for example, verbs in TASKS.values():
        assert example.split()[1] in verbs
        assert set(verbs) <= VERBS.keys()


@pytest.mark.parametrize("columns", [80, 60, 42])
@pytest.mark.parametrize("words", [[], ["--help"], ["sample", "--help"]])
def test_help_fits_the_terminal(flowback, monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = flowback(*words)
    commands = {example for example, _ in TASKS.values()}
    assert [line for line in out.splitlines() if len(line) > columns and line.strip() not in commands] == []


def test_unknown_verb_names_the_nearest(flowback):
    code, _, err = flowback("trian")
    assert code == 2
    assert err == "flowback: There is no verb 'trian'; did you mean train?\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(flowback, verb):
    code, out, _ = flowback(verb, "--help")
    assert code == 0
    assert f"usage: flowback {verb}" in out


def test_help_and_refused_options_load_no_library():
    """PyTorch takes seconds to import. One process, which imports more and more and says who was first."""
    code = f"""
import contextlib, io, sys
from flowback.cli import main

def check(words, *heavy):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(sys.stdout):
            main(words)
    found = {{*heavy, "torch", "numpy", "PIL", "accelerate", "matplotlib"}} & sys.modules.keys()
    assert not found, f"flowback {{' '.join(words)}} imports {{found}}"

for words in ([], ["--help"], ["--version"], ["trian"]):
    check(words, "tyro", "rich", "pydantic")
import flowback
for verb in {list(VERBS)}:
    check([verb, "--help"])
    check([verb, "--no-such-option"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    ("verb", "module", "said"),
    [
        ("sample", "sample", "; what is written is kept. Run the same command again to continue."),
        ("prepare", "prepare", "; what is written is kept. Run the same command again to continue."),
        ("evaluate", "evaluate", ", without a report. Run the same command again: it begins anew."),
        ("presets", "list_presets", "."),
    ],
)
def test_ctrl_c_says_how_to_go_on(flowback, monkeypatch, verb, module, said):
    def stopped(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"flowback.cli.{module}.run", stopped)
    assert flowback(verb) == (130, "", f"flowback: Stopped by Ctrl-C{said}\n")
    monkeypatch.setenv("RANK", "1")
    assert flowback(verb) == (130, "", "")


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
