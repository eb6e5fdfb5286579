"""Completion offers what the option parser takes, in the words of the shell."""

import re
import subprocess

import pytest

from flowback.cli import VERBS
from flowback.cli.completion import choices
from flowback.presets import PRESETS


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_those_of_the_parser(flowback, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = flowback(verb, "--help")
    shown = re.findall(r"^\W (?:-h, )?(--[a-z][\w.-]+)(?:, (--[a-z][\w.-]+))?", out, re.MULTILINE)
    assert set(choices(verb)) == {name for names in shown for name in names if name}


def test_values_are_those_of_the_settings():
    found = choices("train")
    assert found["--train.precision"] == ("fp32", "bf16")
    assert found["--alignment.order"] == ("exact",)  # or any number
    assert found["--train.trackers"] == ("tensorboard", "wandb", "trackio")
    assert found["--train.steps"] == ()


def test_bash_completes(flowback, tmp_path):
    _, script, _ = flowback("completion", "bash")
    asked = {
        "flowback trai": ["train"],
        "flowback train digits-mi": ["digits-mini"],
        "flowback train ": list(PRESETS),
        "flowback train digits --alignment.strategy rev": ["reverse", "reverse-literal"],
        "flowback train digits --train.init": ["--train.init-from"],
        "flowback train --out ": [],  # files
        "flowback classify runs/mini --method b": ["both"],
    }
    empty = "''"
    lines = [
        f"COMP_WORDS=({command}{empty if command.endswith(' ') else ''}); "
        f"COMP_CWORD={len(command.split(' ')) - 1}; "
        'COMPREPLY=(); _flowback; echo "${COMPREPLY[*]}"'
        for command in asked
    ]
    (tmp_path / "script").write_text("\n".join([script, *lines]))
    done = subprocess.run(["bash", tmp_path / "script"], capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == list(asked.values())


def test_the_other_shells_get_theirs(flowback):
    assert "bashcompinit" in flowback("completion", "zsh")[1].splitlines()[0]
    _, fish, _ = flowback("completion", "fish")
    assert (
        "complete -c flowback -n '__fish_seen_subcommand_from train' -l alignment.strategy -x -a 'none "
        in fish
    )
    assert all(f"-f -a {verb} -d '" in fish for verb in VERBS)
