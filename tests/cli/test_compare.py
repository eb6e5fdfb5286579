from __future__ import annotations

import json

from flowback.evaluation.report import Report


def test_two_reports_side_by_side(flowback, tmp_path):
    for name, fid, guidance in (("a", 4.0, 1.0), ("b", 3.5, 2.0)):
        settings = {"guidance": guidance, "seed": 0}
        Report("evaluate", {"fid": fid}, settings, (f"warn {name}",)).save(tmp_path / f"{name}.json")
    out = tmp_path / "difference.json"
    code, text, _ = flowback("compare", tmp_path / "a.json", tmp_path / "b.json", "--json", out)
    assert code == 0
    assert "-0.5" in text
    assert "guidance" in text
    assert "seed" not in text
    assert "warn a" in text
    assert "warn b" in text
    found = json.loads(out.read_text())
    assert found["figures"] == [["fid", 4.0, 3.5]]
    assert found["settings"] == [["guidance", 1.0, 2.0]]
    code, text, _ = flowback("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert "The settings are the same." in text


def test_a_file_that_is_no_report(flowback, tmp_path):
    (tmp_path / "a.json").write_text("[]")
    code, _, error = flowback("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert code == 2
    assert "give a report of flowback" in error
