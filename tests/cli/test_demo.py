import json

from PIL import Image

import flowback as library


def test_demo_writes_all_it_promises(flowback, tmp_path):
    """Three steps of the real thing: every file, every figure; their quality is for `make demo` to show."""
    out = tmp_path / "demo"
    code, printed, err = flowback("demo", "--out", out, "--steps", 3, "--samples", 40)
    assert code == 0, err
    assert "samples.png" in printed
    report = json.loads((out / "report.json").read_text())
    for name in ("none", "reverse"):
        figures = report["runs"][name]
        expected = {
            "nll",
            "top1_gradient",
            "top1_normalised",
            "top1_exhaustive",
            "fd_efficientnet_lite0",
            "seconds",
            "images_per_second",
        }
        assert set(figures) == expected
        assert all(isinstance(value, float) for value in figures.values())
        assert library.load(out / name).config.num_classes == 10
    assert report["settings"]["seed"] == 0
    assert report["environment"]["versions"]["torch"]
    for picture in ("fashion.png", "samples.png", "curves.png"):
        with Image.open(out / picture) as shown:
            assert min(shown.size) > 300
    assert "top1_gradient" in (out / "report.md").read_text()
