"""What the presets say was measured is what the records in docs/figures hold."""

import json
from pathlib import Path

import pytest

from flowback.presets import PRESETS

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def records():
    """Figures by preset."""
    table = json.loads((FIGURES / "table1-mini.json").read_text())
    demo = json.loads((FIGURES / "demo_report.json").read_text())["runs"]
    rows = {row["preset"]: row["mean"] for row in table["rows"]}
    return {**rows, "digits": demo["none"], "digits-reverse": demo["reverse"]}


def test_measured_figures_are_those_of_the_records():
    found = records()
    assert found.keys() == {name for name, preset in PRESETS.items() if preset.measured}
    for name, figures in found.items():
        said = PRESETS[name].measured
        assert said["nll"] == pytest.approx(figures["nll"], abs=5.1e-5)  # as far as digits are shown
        assert said["top1"] == pytest.approx(100 * figures["top1_gradient"], abs=0.051)
        assert said["top1_exhaustive"] == pytest.approx(100 * figures["top1_exhaustive"], abs=0.051)
        assert said["fd_efficientnet_lite0"] == pytest.approx(figures["fd_efficientnet_lite0"], abs=0.051)
