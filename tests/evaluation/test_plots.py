from __future__ import annotations

import matplotlib.font_manager
import pytest
import torch
from PIL import Image

from flowback.evaluation.plots import plot_confusion


@pytest.mark.parametrize("classes", [("cat", "dog"), ("貓", "собака"), ("𓃠", "<b>$x^2$")])
def test_class_names_of_any_script(tmp_path, classes):
    """No warning, which would be an error here, whatever fonts there are."""
    plot_confusion(torch.tensor([[3, 1], [0, 0]]), classes, "test $", tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_a_font_for_other_scripts_is_taken_where_there_is_one(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        matplotlib.font_manager, "get_font_names", lambda: ["DejaVu Sans", "Noto Sans CJK JP"]
    )
    find = matplotlib.font_manager.fontManager._find_fonts_by_props
    monkeypatch.setattr(
        matplotlib.font_manager.fontManager,
        "_find_fonts_by_props",
        lambda prop, *rest, **more: asked.append(prop.get_family()) or find(prop.copy(), *rest, **more),
    )
    plot_confusion(torch.eye(2, dtype=torch.int64), ("貓", "犬"), "test", tmp_path / "confusion.png")
    assert ["DejaVu Sans", "Noto Sans CJK JP"] in asked
