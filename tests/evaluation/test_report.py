from __future__ import annotations

import pytest

from flowback.errors import InputError
from flowback.evaluation.report import compare, make_record, read_record
from flowback.files import write_json


def record(**changes):
    settings = {"samples": 10, "data": {"name": "digits", "path": None}, "guidance": [1.0, 2.0], **changes}
    figures = {
        "fid": 3.5 + settings["samples"],
        "per_class": {"a": 0.5},
        "guidance": [{"scale": 1.0}],
        "note": "x",
    }
    return make_record("evaluate", figures, settings, ["few samples"], "cpu")


def test_a_record_says_what_it_takes_to_repeat_it(tmp_path):
    made = record()
    assert {"versions", "commit", "device", "command", "date"} <= set(made["environment"])
    write_json(tmp_path / "a.json", made)
    assert read_record(tmp_path / "a.json")["figures"]["fid"] == 13.5


def test_comparison_pairs_figures_and_shows_what_differs():
    a, b = record(), record(samples=20, data={"name": "folder", "path": None}, seed=1)
    b["environment"] |= {"device": "another", "date": "later", "command": "other"}
    found = compare(a, b)
    assert found.figures == [("fid", 13.5, 23.5), ("per_class.a", 0.5, 0.5), ("guidance.1.scale", 1.0, 1.0)]
    assert found.settings == [("samples", 10, 20), ("data.name", "digits", "folder"), ("seed", None, 1)]
    assert [name for name, *_ in found.environment] == ["device"]
    same = compare(a, record())
    assert same.settings == []
    assert same.environment == []


def test_records_of_different_kinds_differ_in_kind():
    other = {**record(), "kind": "probe"}
    assert ("kind", "evaluate", "probe") in compare(record(), other).settings


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_record(tmp_path / "text.json")
    (tmp_path / "other.json").write_text('{"figures": 1}')
    with pytest.raises(InputError, match="is no record"):
        read_record(tmp_path / "other.json")
