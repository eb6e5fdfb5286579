from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flowback import Flow
from flowback.errors import InputError
from flowback.evaluation.report import Report, compare, weights_of
from reference import random_flow


def report(**changes):
    settings = {"samples": 10, "data": {"name": "digits", "path": None}, "guidance": [1.0, 2.0], **changes}
    figures = {
        "fid": 3.5 + settings["samples"],
        "per_class": {"a": 0.5},
        "guidance": [{"scale": 1.0}],
        "note": "x",
    }
    return Report("evaluate", figures, settings, ("few samples",))


def test_a_report_says_what_it_takes_to_repeat_it(tmp_path):
    made = report()
    assert {"versions", "commit", "device", "command", "date"} <= set(made.environment)
    made.save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == made


def test_what_json_does_not_know_is_saved_as_what_it_knows(tmp_path):
    made = report(path=tmp_path / "x", tensor=torch.ones(2), scales=(1.0, math.nan))
    made.save(tmp_path / "a.json")
    settings = Report.load(tmp_path / "a.json").settings
    assert settings["path"] == str(tmp_path / "x")
    assert (settings["tensor"], settings["scales"]) == ([1, 1], [1, None])


def test_comparison_pairs_figures_and_shows_what_differs():
    a, b = report(), report(samples=20, data={"name": "folder", "path": None}, seed=1)
    b.environment.update({"device": "another", "date": "later", "command": "other"})
    found = compare(a, b)
    assert found.figures == [("fid", 13.5, 23.5), ("per_class.a", 0.5, 0.5), ("guidance.1.scale", 1.0, 1.0)]
    assert found.settings == [("samples", 10, 20), ("data.name", "digits", "folder"), ("seed", None, 1)]
    assert [name for name, *_ in found.environment] == ["device"]
    same = compare(a, report())
    assert same.settings == []
    assert same.environment == []


def test_reports_of_different_kinds_differ_in_kind():
    other = replace(report(), kind="probe")
    assert ("kind", "evaluate", "probe") in compare(report(), other).settings


def test_files_that_are_no_reports(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Report.load(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        Report.load(tmp_path / "text.json")
    (tmp_path / "other.json").write_text('{"figures": 1}')
    with pytest.raises(InputError, match="is not a report"):
        Report.load(tmp_path / "other.json")


def test_the_hash_of_the_weights_follows_the_weights(tmp_path):
    flow = random_flow()
    before = weights_of(flow)
    assert before["checkpoint"] is None
    flow.save_pretrained(tmp_path / "flow")
    stored = weights_of(Flow.from_pretrained(tmp_path / "flow"))
    assert stored == {"checkpoint": str(tmp_path / "flow"), "weights_sha256": before["weights_sha256"]}
    with torch.no_grad():
        flow.blocks[0].class_table[0, 0] += 1
    assert weights_of(flow) != before
