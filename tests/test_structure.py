"""Imports point strictly down the levels, every module says what is public, and versions are pinned once."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import flowback

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "flowback"

LEVELS = (
    {"errors"},
    {"checked", "devices", "files", "folder_lock", "heap", "hub", "progress", "provenance", "reading"},
    {"compiled", "config", "processes", "task_config"},
    {"checkpoint", "data", "nn", "presets"},
    {"flow"},
    {"alignment", "classification", "model_card", "sampling", "tarflow_weights"},
    {"named_model", "students"},
    {"model"},
    {"evaluation", "flow_pipeline", "sample_folder"},
    {"app", "training"},
    {"tables"},
    {"cli"},
    {"__init__", "__main__"},
)
"""From the bottom up; a name imports from lower levels only."""

LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ["flowback", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def loaded(module: str) -> ModuleType:
    """The module; the test is skipped where it needs an optional package that is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        pytest.skip("the page of the app needs gradio")


def top(module: str) -> str:
    """The part of a dotted name that has a level: flowback.nn.patch -> nn."""
    return [*module.split("."), "__init__"][1]


def imports(source: str) -> Iterator[str]:
    """Names of flowback that a source imports, as dotted paths, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "flowback")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "flowback":  # from flowback import checkpoint: a module, or a public name
                names = {alias.name for alias in node.names} - {"__version__"}
                yield from (f"flowback.{name}" if name in LEVEL else "flowback" for name in names)
            elif node.module and node.module.startswith("flowback."):
                yield node.module


def violations(own: str, source: str) -> list[str]:
    """Imports of a file under the top-level name ``own`` that do not point down."""
    return [name for name in imports(source) if top(name) != own and LEVEL[top(name)] >= LEVEL[own]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in LEVEL, f"{own} is new: give it a level here and in CONTRIBUTING.md"
    assert violations(own, file.read_text()) == []


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("nn", "from flowback.flow import Flow"),  # upward
        ("flow", "import flowback.sampling.sampler"),
        ("sampling", "def f():\n    from flowback.alignment import loss"),  # sideways, and hidden
        ("errors", "from flowback import config"),
        ("training", "from flowback import Flow"),  # through the top
        ("cli", "import flowback"),
    ],
)
def test_the_rule_catches(own, source):
    assert violations(own, source)


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("sampling", "from flowback.sampling.guidance import Guidance"),
        ("cli", "from flowback import checkpoint\nfrom flowback.flow import Flow"),
        ("config", "from flowback.errors import InputError\nimport torch"),
    ],
)
def test_the_rule_allows(own, source):
    assert not violations(own, source)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_public_functions_and_classes_are_in_all(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "a module starts with what it is"
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    module = loaded(module_name(file))
    listed = set(getattr(module, "__all__", ()))
    assert {name for name in defined if not name.startswith("_")} <= listed
    assert all(hasattr(module, name) for name in listed)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_modules_take_only_public_names_from_each_other(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flowback"):
            module = loaded(node.module)
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = hasattr(module, "__path__") and importlib.util.find_spec(name) is not None
                assert is_module or alias.name in module.__all__, name


def test_public_names_are_exported_once():
    assert len(set(flowback.__all__)) == len(flowback.__all__)
    assert all(hasattr(flowback, name) for name in flowback.__all__)


def test_library_code_needs_no_optional_package():
    optional = ("tensorboard", "wandb", "trackio", "diffusers", "datasets", "gradio")
    code = f"import sys\nfor name in {optional}: sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", code + "import flowback, flowback.cli"], check=True)


def test_versions_in_pre_commit_equal_those_in_pyproject():
    developers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "dev"
    ]
    (ruff,) = (item.split("==")[1] for item in developers if item.startswith("ruff=="))
    assert any(item.startswith("mypy==") for item in developers)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks)[1] == ruff
