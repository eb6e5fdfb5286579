"""What stands around the code says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import flowback

ROOT = Path(__file__).parent.parent


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_is_of_this_version():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == flowback.__version__
    assert {"title", "message", "authors", "license"} <= set(citation)
    for paper in citation["references"]:
        number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
        assert paper["url"].endswith(number)
        assert number in (ROOT / "README.md").read_text()


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == flowback.__version__


def test_the_workflow_calls_what_is_there():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    (light,) = (command for command in commands if command.startswith("pytest"))
    assert [name for name in light.split()[1:] if not (ROOT / name).exists()] == []


def test_issue_templates_are_forms():
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = read(file)
        assert file.name == "config.yml" or {"name", "description", "body"} <= set(form)
