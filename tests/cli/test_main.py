import json
import subprocess
import sys

import pytest

from flowback import __version__
from flowback.cli import VERBS


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
