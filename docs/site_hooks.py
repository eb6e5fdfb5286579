"""What the documentation site needs beside docs/*.md: pages made from files elsewhere, and links that fit it.

The README is the first page; examples, notebook, change log and contributing guide are pages too. Nothing is
copied by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
COPIED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES = {**COPIED, "examples": "examples.md", "examples/": "examples.md", "examples/tour.ipynb": "tour.md"}
"""Pages by the file that they are made from."""
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")
ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from other files."""
    made = {page: (ROOT / name).read_text() for name, page in COPIED.items()}
    made["examples.md"] = _examples()
    made["tour.md"] = _notebook(ROOT / "examples" / "tour.ipynb")
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    docs = Path(config.docs_dir)
    for folder in filter(Path.is_dir, (docs / "figures").iterdir()):
        names = sorted(file.name for file in folder.iterdir())
        text = "\n".join([f"# Records of {folder.name}", "", *(f"- [{name}]({name})" for name in names)])
        page = f"{folder.relative_to(docs)}/index.md"
        files.append(File.generated(config, page, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository, as links between pages; guides first in the search."""
    if page.file.src_uri.startswith("reference/"):
        page.meta["search"] = {"boost": 0.2}
    if "/" in page.file.src_uri:  # written for the site
        return markdown
    return LINK.sub(lambda link: f"]({_target(link[1])})", markdown)


def on_post_build(config: Any) -> None:
    """Refuse pages that would load something from elsewhere."""
    for page in Path(config.site_dir).rglob("*.html"):
        if found := ELSEWHERE.search(page.read_text()):
            raise PluginError(f"{page} loads from elsewhere: {found[0]}")


def _target(link: str) -> str:
    """Where a link of README.md or docs/*.md leads in the site."""
    path, hash_, anchor = link.partition("#")
    path = path.removeprefix("../").removeprefix("docs/")
    if path.startswith("examples/") and path.endswith(".py"):
        return f"examples.md#{path.removeprefix('examples/').replace('.', '')}"
    if path.startswith("figures/") and path.endswith("/"):
        path += "index.md"
    return PAGES.get(path, path) + hash_ + anchor


def _examples() -> str:
    """All scripts in one page."""
    parts = ["# Examples", "", "These are the files in `examples/`. The tests run them."]
    for file in sorted((ROOT / "examples").glob("*.py")):
        parts += ["", f"## {file.name}", "", "```python", file.read_text().rstrip(), "```"]
    return "\n".join(parts)


def _notebook(file: Path) -> str:
    """The cells of a notebook, without outputs."""
    parts = []
    for cell in json.loads(file.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(parts)
