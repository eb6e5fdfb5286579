import json
import math
from dataclasses import replace

import pytest

from flowback.config import DataConfig
from flowback.presets import PRESETS
from flowback.tables import row_run


@pytest.fixture
def small_row(monkeypatch, photos):
    """A quick row, on a few photographs."""
    preset = PRESETS["imagenet64-mini"]
    model = replace(preset.config.model, channels=3, width=32, layers=1)
    config = replace(preset.config, model=model, data=DataConfig("folder", photos))
    monkeypatch.setitem(PRESETS, "imagenet64-mini", replace(preset, config=config))


def test_a_table_is_filled_and_what_is_done_is_skipped(flowback, small_row, tmp_path, monkeypatch, caplog):
    words = [
        *("reproduce", "table1", "--scale", "mini", "--rows", "imagenet64-mini", "--out", tmp_path),
        *("--steps", 2, "--samples", 12, "--device", "cpu"),
    ]
    code, _, err = flowback(*words)
    assert code == 0, err
    assert "Row 1 of 1, seed 0: imagenet64-mini" in caplog.text
    first = json.loads((tmp_path / "table1-mini.json").read_text())
    assert [row["preset"] for row in first["rows"]] == ["imagenet64-mini"]
    assert first["columns"] == [
        "nll",
        *(f"top1_{rule}" for rule in ("gradient", "normalised", "exhaustive")),
        "fd_efficientnet_lite0",
    ]
    assert first["rows"][0]["std"]["nll"] is None
    started = []
    train = row_run.train

    def noting(config, *rest, **more):
        started.append(config)
        return train(config, *rest, **more)

    monkeypatch.setattr(row_run, "train", noting)
    code, out, err = flowback(*words, "--seeds", 2)
    assert code == 0, err
    assert [config.train.seed for config in started] == [1]
    second = json.loads((tmp_path / "table1-mini.json").read_text())
    for before, row in zip(first["rows"], second["rows"], strict=True):
        a, b = row["values"]["nll"]
        assert a == before["mean"]["nll"] != b
        assert row["mean"]["nll"] == pytest.approx((a + b) / 2)
        assert row["std"]["nll"] == pytest.approx(abs(a - b) / math.sqrt(2))
    text = (tmp_path / "table1-mini.md").read_text()
    (row,) = second["rows"]
    cells = f"| {row['mean']['nll']:.4g} ± {row['std']['nll']:.2g} |"
    assert f"| imagenet64-mini {cells}" in text
    assert "Seeds 0, 1" in text
    assert f"{row['mean']['nll']:.4g}" in out
    words[words.index("--steps") + 1] = 3
    code, _, err = flowback(*words)
    assert code == 2
    assert "config.train.steps was 2, now 3" in err


def test_probes_of_a_figure(flowback, small_row, tmp_path, monkeypatch):
    words = [
        *["--scale", "mini", "--rows", "imagenet64-mini", "--steps", "2", "--device", "cpu", "--out"],
        tmp_path,
    ]
    code, out, err = flowback("reproduce", "figure4", *words)
    assert code == 0, err
    (row,) = json.loads((tmp_path / "figure4-mini.json").read_text())["rows"]
    assert row["mean"].keys() == {"top1_gradient", "best_linear"}
    (points,) = row["curves"]["locations"]
    assert [(point["block"], point["layer"]) for point in points] == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert max(point["linear"] for point in points) == row["mean"]["best_linear"]
    assert (tmp_path / "figure4-mini-locations.svg").is_file()
    assert "best_linear" in out


def test_tables_that_take_no_run_are_shown(flowback, tmp_path):
    code, out, err = flowback("reproduce", "table6", "--out", tmp_path)
    assert code == 0, err
    assert "imagenet64-reverse" in out
    assert "0.9999" in out


BAD = {
    "table": (["table99", "--scale", "mini"], "There is no table 'table99'; did you mean table"),
    "data": (["table1"], "table1 needs its images: give --data, or --scale mini"),
    "seeds": (["table1", "--scale", "mini", "--seeds", "0"], "--seeds must be at least 1"),
    "guidance nan": (["table1", "--scale", "mini", "--guidance", "nan"], "not a finite number"),
    "blocks": (["table1", "--scale", "mini", "--guided-blocks", "-1"], "--guided-blocks must not be"),
    "seed": (["table1", "--scale", "mini", "--first-seed", str(2**32)], "--seed 4294967296 is out of range"),
    "temperature": (["table1", "--scale", "mini", "--attention-temperature", "0"], "must be above 0"),
    "encoders": (["table8", "--scale", "mini"], "have no small siblings"),
    "rows": (["table1", "--scale", "mini", "--rows", "nope"], "--rows nope matches no row"),
    "samples": (["table1", "--scale", "mini", "--samples", "1"], "--samples must be at least 2"),
    "search": (["table1", "--scale", "mini", "--search", "2:1:1"], "neither a number nor FIRST:LAST:STEP"),
    "guidance": (["table1", "--scale", "mini", "--guidance", "1", "--search", "0:2:1"], "give one"),
}


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(flowback, tmp_path, words, sentence):
    code, out, err = flowback("reproduce", *words, "--out", tmp_path / "results")
    assert code == 2, (out, err)
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()
