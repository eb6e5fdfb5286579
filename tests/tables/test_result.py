"""Statistics over seeds, by hand and against scipy."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from flowback.tables import Difference, Row, Table, images_needed, paired_difference
from flowback.tables.summary import compared

ENVIRONMENT = {
    "device": "cpu: test",
    "versions": {"torch": "2"},
    "commit": "abc",
    "command": "flowback reproduce",
}


def row(preset, seeds, values, **more):
    values = {name: list(found) for name, found in values.items()}
    return Row(
        preset=preset,
        about="",
        seeds=list(seeds),
        values=values,
        mean={name: float(np.mean(found)) for name, found in values.items()},
        std={
            name: float(np.std(found, ddof=1)) if len(found) > 1 else None for name, found in values.items()
        },
        published={},
        **more,
    )


def test_paired_differences_and_their_interval_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5)
    found = paired_difference(row("a", range(5), {"nll": a}), row("b", range(5), {"nll": b}), "nll")
    assert found.mean == pytest.approx((a - b).mean())
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def test_three_seeds_by_hand():
    found = Difference.of([1.0, 2.0, 3.0])  # t(0.975; 2) = 4.3027, standard deviation 1
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_pairs_are_matched_by_seed_and_a_single_one_has_no_interval():
    a, b = row("a", [0, 2], {"nll": [1.0, 5.0]}), row("b", [2, 1], {"nll": [4.0, 9.0]})
    found = paired_difference(a, b, "nll")
    assert (found.values, found.mean, found.low, found.high) == ([1.0], 1.0, None, None)
    assert paired_difference(a, b, "fid") is None
    assert paired_difference(a, row("c", [7], {"nll": [1.0]}), "nll") is None


def test_images_needed_interpolates_and_is_none_where_it_never_gets_there():
    curve = [{"images": 100.0, "a": 0.2}, {"images": 150.0}, {"images": 200.0, "a": 0.6}]
    assert images_needed(curve, "a", 0.3, higher=True) == pytest.approx(125)
    assert images_needed(curve, "a", 0.1, higher=True) == 100
    assert images_needed(curve, "a", 0.7, higher=True) is None
    assert images_needed(curve, "b", 0.1, higher=True) is None
    falling = [{"images": 10.0, "n": 1.0}, {"images": 20.0, "n": -1.0}]
    assert images_needed(falling, "n", 0.0, higher=False) == pytest.approx(15)


def curve(*values):
    return [{"images": 100.0 * (i + 1), "test_top1_gradient": value} for i, value in enumerate(values)]


def test_how_much_sooner_is_a_ratio_by_seed_and_left_out_where_a_seed_never_gets_there():
    base = row("none", [0, 1], {}, curves={"training": [curve(0.1, 0.2, 0.4), curve(0.1, 0.2, 0.4)]})
    fast = row("fast", [0, 1], {}, curves={"training": [curve(0.4, 0.5), curve(0.2, 0.6)]})
    late = row("late", [0, 1], {}, curves={"training": [curve(0.4, 0.5), curve(0.1, 0.2)]})
    found = {
        each.preset: each
        for each in compared([base, fast, late], {"none": False, "fast": True, "late": True}, None)
    }
    assert found["fast"].sooner["test_top1_gradient"].values == pytest.approx([3.0, 2.0])
    assert found["late"].sooner == {}
    assert found["none"].sooner == {}


def test_aligned_rows_are_compared_with_the_row_without_above_or_with_the_one_asked_for():
    rows = [row(name, [0], {"nll": [1.0]}) for name in ("a", "b", "c", "d")]
    aligned = {"a": False, "b": True, "c": False, "d": True}
    assert [each.baseline for each in compared(rows, aligned, None)] == [None, "a", None, "c"]
    assert [each.baseline for each in compared(rows, aligned, "b")] == ["b", None, "b", "b"]
    assert [each.baseline for each in compared(rows[1:2] + rows[3:], aligned, None)] == [None, "b"]


def table(rows, seeds):
    settings = {"seeds": seeds, "samples": 10}
    return Table(
        "table1", "Strategies", "mini", ["nll"], rows, settings, ["Mixed."], ["A note."], ENVIRONMENT
    )


def test_the_markdown_tells_what_the_figures_support(tmp_path):
    rows = compared(
        [row("a", [0, 1], {"nll": [1.0, 2.0]}), row("b", [0, 1], {"nll": [2.0, 4.0]})],
        {"a": False, "b": True},
        None,
    )
    table(rows, [0, 1]).save(tmp_path)
    text = (tmp_path / "table1-mini.md").read_text()
    assert "| a | 1.5 ± 0.71 |" in text
    assert "| b − a | +1.5 [-4.85, +7.85] |" in text
    assert "Seeds 0, 1: mean ± standard deviation" in text
    assert "- A note.\n" in text
    assert "- Mixed.\n" in text
    stored = json.loads((tmp_path / "table1-mini.json").read_text())
    assert stored["table"] == "table1-mini"
    assert stored["rows"][1]["seeds"] == [0, 1]
    assert stored["rows"][1]["values"]["nll"] == [2.0, 4.0]
    assert stored["rows"][1]["mean"]["nll"] == 3.0
    assert stored["rows"][1]["std"]["nll"] == pytest.approx(math.sqrt(2))
    assert stored["rows"][1]["difference"]["nll"]["values"] == [1.0, 2.0]


def test_one_seed_has_no_standard_deviation_and_the_table_says_so():
    failed = Row("b", "", [], {}, {}, {}, {}, failures={0: "It diverged."})
    text = table([row("a", [0], {"nll": [1.0]}), failed], [0]).to_markdown()
    assert "| a | 1 |" in text
    assert "no standard deviation" in text
    assert "| b | failed |" in text
    assert "b, seed 0, failed: It diverged." in text


def test_a_baseline_that_stands_still_gains_nothing_by_its_length():
    """It first had its last value after 100 images; the row had it after 50. Without this it would be 8."""
    still = row("none", [0], {}, curves={"training": [curve(0.4, 0.4, 0.4, 0.4)]})
    points = [{"images": 50.0, "test_top1_gradient": 0.4}, *curve(0.4, 0.4)]
    fast = row("fast", [0], {}, curves={"training": [points]})
    found = compared([still, fast], {"none": False, "fast": True}, None)[1]
    assert found.sooner["test_top1_gradient"].values == pytest.approx([2.0])


def test_a_row_that_lacks_seeds_is_named():
    text = table([row("a", [0, 1], {"nll": [1.0, 2.0]}), row("b", [1], {"nll": [2.0]})], [0, 1]).to_markdown()
    assert "- b has figures of seed 1 alone." in text
    assert "- a has figures" not in text
