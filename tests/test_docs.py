"""The names that the texts mention exist, so do the files that they link to; the site is complete."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import flowback

ROOT = Path(__file__).parent.parent
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAME = re.compile(r"`@?(flowback(?:\.\w+)+)[`(]")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    found = importlib.import_module("flowback")
    for depth, part in enumerate(name.split(".")[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(name.split(".")[:depth]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def test_the_check_sees_what_is_wrong():
    assert NAME.findall("`flowback.classify` and `flowback.load(...)`") == [
        "flowback.classify",
        "flowback.load",
    ]
    assert exists("flowback.flow.affine.forward")
    assert not exists("flowback.flow.affine.sideways")
    assert not exists("flowback.nowhere")


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_names_exist(text):
    assert [name for name in set(NAME.findall(text.read_text())) if not exists(name)] == []


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text):
    links = LINK.findall(text.read_text())
    assert [link for link in links if not (text.parent / link).exists()] == []


def test_the_reference_has_every_public_name_once():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"^::: flowback\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(set(flowback.__all__) - {"__version__"}), "docs/reference/*.md"


def test_the_site_has_every_page():
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    listed = re.findall(r"^ +- (?:[^:\n]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert pages - set(listed) == set(), "mkdocs.yml: nav"
