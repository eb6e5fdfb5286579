import json
import math
from dataclasses import replace

import pytest

from flowback.cli import reproduce, train
from flowback.config import DataConfig
from flowback.presets import PRESETS, TABLES, table


@pytest.fixture
def small_table(monkeypatch, photos):
    """A table of one quick row, on a few photographs."""
    rows = {name: PRESETS[name] for name in ("imagenet64-mini",)}
    for name, preset in rows.items():
        model = replace(preset.config.model, channels=3, width=32, layers=1)
        config = replace(preset.config, model=model, data=DataConfig("folder", photos))
        rows[name] = replace(preset, config=config)
        monkeypatch.setitem(PRESETS, name, rows[name])
    monkeypatch.setattr(reproduce, "table", lambda name, mini: rows)


def test_a_table_is_filled_and_what_is_done_is_skipped(flowback, small_table, tmp_path, monkeypatch):
    words = (
        "reproduce",
        "table1",
        "--mini",
        "--out",
        tmp_path,
        "--steps",
        2,
        "--samples",
        12,
        "--device",
        "cpu",
    )
    code, _, err = flowback(*words)
    assert code == 0, err
    first = json.loads((tmp_path / "table1-mini.json").read_text())
    assert [row["preset"] for row in first["rows"]] == ["imagenet64-mini"]
    assert first["columns"] == ["nll", "top1_gradient", "top1_exhaustive", "fd_efficientnet_lite0"]
    assert first["rows"][0]["spread"]["nll"] is None
    started = []
    begin = train.run
    monkeypatch.setattr(train, "run", lambda argv: started.append(argv) or begin(argv))
    code, _, err = flowback(*words, "--seeds", 2)
    assert code == 0, err
    assert [argv[argv.index("--train.seed") + 1] for argv in started] == ["1"]
    second = json.loads((tmp_path / "table1-mini.json").read_text())
    for before, row in zip(first["rows"], second["rows"], strict=True):
        a, b = row["values"]["nll"]
        assert a == before["mean"]["nll"] != b
        assert row["mean"]["nll"] == pytest.approx((a + b) / 2)
        assert row["spread"]["nll"] == pytest.approx(abs(a - b) / math.sqrt(2))
    text = (tmp_path / "table1-mini.md").read_text()
    (row,) = second["rows"]
    cells = f"| {row['mean']['nll']:.4g} ± {row['spread']['nll']:.2g} |"
    assert f"| imagenet64-mini {cells}" in text
    assert "Seeds 0 to 1" in text


def test_every_published_row_is_a_preset_with_a_small_sibling():
    assert len(table("table1")) == 12
    for name in TABLES:
        for row, preset in table(name).items():
            assert PRESETS[row] is preset
            small = PRESETS.get(f"{row}-mini")
            assert (small is None) == (name == "encoders")
            if small is not None:
                assert small.config.alignment.strategy == preset.config.alignment.strategy
                assert small.config.model.tokens <= 64
    several = PRESETS["imagenet64-reverse-all-2-mini"].config.alignment.locations
    assert several == ((1, 1), (2, 1), (3, 1), (4, 1))
    assert PRESETS["imagenet64-reverse-mini"].config.alignment.locations == ((3, 3), (4, 3))
    assert PRESETS["imagenet64-forward-first-2-mini"].config.alignment.locations == ((1, 1), (2, 1))


BAD = {
    "table": (["table99", "--mini"], "There is no table 'table99'; did you mean table1"),
    "data": (["table1"], "table1 needs its images: give --data, or --mini"),
    "seeds": (["table1", "--mini", "--seeds", "0"], "--seeds must be at least 1"),
    "encoders": (["encoders", "--mini"], "have no small siblings"),
}


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(flowback, tmp_path, words, sentence):
    code, out, err = flowback("reproduce", *words, "--out", tmp_path / "results")
    assert code == 2, (out, err)
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()
