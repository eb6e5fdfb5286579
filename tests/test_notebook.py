"""The notebook runs from its first cell to its last, with settings that take a second or two."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tour.ipynb"
SMALL = {
    'PRESET, STEPS = "digits", 600': 'PRESET, STEPS = "digits-mini", 2',
    "EACH = 8": "EACH = 1",
    "LIMIT = None": "LIMIT = 16",
}


def test_the_tour(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs: they make changes hard to read"
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for setting, smaller in SMALL.items():
        assert setting in code
        code = code.replace(setting, smaller)
    exec(compile(code, str(NOTEBOOK), "exec"), {"__name__": "__main__"})
    matplotlib.pyplot.close("all")
    said = capsys.readouterr().out
    assert "exhaustive: " in said
    assert "16 test images" in said
    assert "bits_per_dim: " in said
    assert "cosine with the encoder" in said
