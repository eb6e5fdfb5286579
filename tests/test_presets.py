"""Presets build; published figures are the paper's, measured ones those of the records in docs/figures."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from flowback import InputError, get_preset, list_presets
from flowback.checked import from_dict, to_dict
from flowback.config import RunConfig
from flowback.presets import PRESETS, TABLES, settings
from flowback.tables import rows_of

FIGURES = Path(__file__).parents[1] / "docs" / "figures"

# arXiv 2511.22345v2, copied by hand a second time.
PAPER = {
    "table1": """
        imagenet64                 12.91 33.79 36.62 37.43
        imagenet64-forward-all-2   12.25 37.97 40.85 46.97
        imagenet64-detach-all-2    12.19 34.31 41.98 49.06
        imagenet64-reverse-all-2   12.21 33.80 42.08 49.91
        imagenet64-forward-first-2 12.67 39.99 41.11 61.16
        imagenet64-detach-first-2  12.73 33.84 37.81 61.63
        imagenet64-detach-last-2   12.12 34.00 41.18 55.14
        imagenet64-reverse-last-2  11.93 33.78 40.90 55.21
        imagenet64-reverse-last-4  11.84 33.61 46.06 58.91
        imagenet64-reverse         11.71 33.68 44.31 57.35""",
    "table2": """
        imagenet64-1000k          11.76 39.97
        imagenet64-reverse        11.71 57.76
        imagenet64-reverse-600k   11.53 57.75
        imagenet64-reverse-800k   11.48 57.65
        imagenet64-reverse-1000k  11.25 57.02
        imagenet256               13.82 45.97
        imagenet256-1000k         13.05 40.22
        imagenet256-reverse       13.26 57.85
        imagenet256-reverse-1000k 12.79 56.24""",
    "table3": """
        imagenet64-1000k         4.21 5.34
        imagenet64-reverse-1000k 3.69 4.34""",
    "table4": """
        imagenet256-1000k                5.15 6.78 243.49
        imagenet256-reverse-1000k        4.95 6.89 234.99
        imagenet256-reverse-patch1-1000k 4.18 4.96 240.8""",
    "table5": """
        imagenet64-forward-last-2 2.11
        imagenet64-detach-last-2  1.93
        imagenet64-reverse-last-2 1.87""",
    "table6": """
        imagenet64-reverse  256 1e-4 1e-4 0.9999 0.1
        imagenet256-reverse 256 1e-4 1e-4 0.9999 0.1""",
    "table7": """
        imagenet64-detach-all-2 12.19 34.31 49.00
        imagenet64-detach-all-4 12.14 33.97 54.14
        imagenet64-detach-all-6 12.37 34.32 54.98""",
    "table8": """
        imagenet64-reverse-clip-b   12.41 33.99 41.99 38.99
        imagenet64-reverse-mae-b    12.32 34.00 39.69 37.57
        imagenet64-reverse          11.71 33.68 44.31 57.35
        imagenet64-reverse-dinov2-l 11.74 33.87 45.00 58.80""",
    "table9": """
        imagenet256                   13.82
        imagenet256-reverse           13.26
        imagenet256-reverse-weight0.5 13.74""",
}


@pytest.mark.parametrize("table", PAPER)
def test_published_figures_are_the_papers(table):
    rows = [line.split() for line in PAPER[table].strip().splitlines()]
    assert [name for name, *_ in rows] == list(TABLES[table].presets)
    for name, *figures in rows:
        assert list(TABLES[table].figures_of(name).values()) == [float(figure) for figure in figures]


def test_figures_of_50_000_samples_stand_on_runs_of_a_million_steps():
    for name, preset in PRESETS.items():
        if "fid_50k" in preset.published and not name.startswith("tarflow"):
            assert preset.config.train.steps == 1_000_000, name
    assert PRESETS["imagenet64-reverse-1000k"].published["fid_50k"] == 3.69
    assert PRESETS["imagenet64-reverse"].published == {
        "fid": 11.71,
        "sfid": 33.68,
        "is": 44.31,
        "top1": 57.35,
    }


def test_every_preset_is_a_run_and_has_a_name_of_its_own():
    groups = (value for name, value in vars(settings).items() if name.startswith("_") and name.isupper())
    names = [
        row[0] for group in groups if isinstance(group, tuple) for row in group if isinstance(row, tuple)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert set(names) == {name for name in PRESETS if not name.endswith("-mini")} | {"digits-mini"}
    for name, preset in PRESETS.items():
        assert from_dict(RunConfig, to_dict(preset.config)) == preset.config
        assert preset.about, name
        for block, layer in preset.config.alignment.locations if preset.config.alignment.active else ():
            assert (block, layer) in preset.config.model.locations, name


def test_rows_do_what_their_names_say():
    for name, preset in PRESETS.items():
        config = preset.config
        if name.startswith(("imagenet", "fashion")):
            strategy = config.alignment.strategy
            order = config.alignment.order if strategy != "none" else 0
            words = name.removesuffix("-mini").split("-")
            said = next((word for word in words if word in ("forward", "detach", "reverse", "exact")), "none")
            assert (strategy, order) == (("reverse", "exact") if said == "exact" else (said, 0)), name
    for size, steps in ((64, 1_000_000), (256, 1_000_000)):
        assert get_preset(f"imagenet{size}-1000k").config.train.steps == steps
    for noise in (0.1, 0.15, 0.25, 0.3):
        assert get_preset(f"imagenet256-noise{noise}").config.model.noise_std == noise
    assert get_preset("imagenet256").config.model.noise_std == 0.2


def test_tarflow_has_its_own_budgets():
    """Epochs × full batches of an epoch, from the commands in apple/ml-tarflow's README and its issue 7."""
    for name, images, epochs, batch, patch, width, noise in (
        ("imagenet64", 1_281_167, 200, 256, 2, 768, 0.05),
        ("imagenet64-patch4", 1_281_167, 300, 480, 4, 1024, 0.05),
        ("imagenet64-uncond", 1_281_149, 200, 256, 2, 768, 0.05),
        ("imagenet64-bpd", 1_281_149, 100, 256, 2, 768, 0.05),
        ("imagenet128", 1_281_167, 320, 768, 4, 1024, 0.15),
        ("afhq256", 14_630, 4000, 256, 8, 768, 0.07),
    ):
        config = get_preset(f"tarflow-{name}").config
        assert config.train.steps == epochs * (images // batch)
        assert config.train.warmup_steps == images // batch
        assert (config.train.batch_size, config.train.lr, config.train.min_lr) == (batch, 1e-4, 1e-6)
        assert (config.model.patch_size, config.model.width, config.model.noise_std) == (patch, width, noise)
        assert not config.alignment.active
    assert get_preset("tarflow-imagenet64").config.model.num_classes == 1000
    assert get_preset("tarflow-imagenet64-bpd").config.model.noise == "uniform"


def test_itarflow_has_its_own_budgets():
    """Epochs × full batches of 512, from the commands of ml-itarflow's README, the rest from its code."""
    for size, patch, width, highest, epochs, drop in (
        (64, 2, 1280, 0.3, 300, 0.1),
        (128, 4, 1600, 0.5, 450, 0.1),
        (256, 8, 2176, 0.7, 600, 0.0),
    ):
        config = get_preset(f"itarflow-imagenet{size}").config
        model, train = config.model, config.train
        assert (model.image_size, model.patch_size, model.width) == (size, patch, width)
        assert (model.layers, model.head_dim, model.tokens) == ((4, 4, 4, 24), 64, 1024)
        assert (model.noise, model.noise_min, model.noise_max) == ("range", 0.01, highest)
        assert (train.levels, train.level_weight, train.label_drop) == ("uniform", "level", drop)
        assert (train.batch_size, train.steps, train.warmup_steps) == (512, epochs * 2502, 2502)
        assert (train.lr, train.min_lr, train.ema_decay, train.grad_clip) == (1e-4, 1e-5, 0.0, None)
        assert config.data.flip
        small = get_preset(f"itarflow-imagenet{size}-mini").config
        assert (small.model.layers, small.model.noise, small.model.tokens) == ((1, 1, 1, 6), "range", 64)
        assert (small.train.levels, small.train.level_weight) == ("uniform", "level")
        assert small.model.noise_max / small.model.noise_min == pytest.approx(highest / 0.01)


def test_starflows_layout_is_tarflows_model_otherwise():
    plain, deep = (get_preset(name).config for name in ("tarflow-imagenet64-patch4", "starflow-imagenet64"))
    assert deep.model.layers == (2, 2, 2, 2, 2, 24)
    model = dataclasses.replace(deep.model, blocks=8, layers=8)
    assert dataclasses.replace(deep, model=model) == plain


def test_fashion_rows_differ_in_what_they_are_about_alone():
    plain = get_preset("fashion").config
    assert plain.model.tokens == 49
    for name in list_presets("fashion-*-*"):
        config = get_preset(name).config
        noise = dict.fromkeys(("noise", "noise_min", "noise_max"))
        ranged = {key: getattr(config.model, key) for key in noise} if "range" in name else {}
        assert config.model == dataclasses.replace(plain.model, **ranged), name
        assert config.data == plain.data, name


def test_rows_with_a_range_of_levels_are_their_siblings_otherwise():
    for name in ("fashion", "fashion-reverse-4", "fashion-exact-last", "digits"):
        plain = get_preset(name).config
        ranged = get_preset(re.sub("^(fashion|digits)", r"\1-range", name)).config
        assert (ranged.model.noise, ranged.model.noise_min, ranged.model.noise_max) == ("range", 0.05, 0.5)
        assert dataclasses.replace(ranged.train, level_weight=plain.train.level_weight) == plain.train
        if plain.alignment.active:  # the mean of w(t) is 1/2
            assert dataclasses.replace(ranged.alignment, weight=0.5) == plain.alignment


def test_small_siblings_keep_what_their_row_is_about():
    for table, paper in TABLES.items():
        for row in paper.presets:
            small, whole = PRESETS.get(f"{row}-mini"), PRESETS[row].config
            encoders = table == "table8" and row != "imagenet64-reverse"
            assert (small is None) == encoders, row
            if small is not None:
                assert small.config.alignment.strategy == whole.alignment.strategy
                assert small.config.model.tokens <= 64
    several = PRESETS["imagenet64-reverse-all-2-mini"].config.alignment.locations
    assert several == ((1, 1), (2, 1), (3, 1), (4, 1))
    assert PRESETS["imagenet64-reverse-mini"].config.alignment.locations == ((3, 3), (4, 3))
    assert PRESETS["imagenet64-forward-first-2-mini"].config.alignment.locations == ((1, 1), (2, 1))


def test_every_table_of_the_paper_has_rows():
    assert [f"table{number}" for number in range(1, 10)] == [
        name for name in TABLES if name.startswith("table")
    ]
    assert {"figure4", "figure5"} < TABLES.keys()
    assert len(rows_of("table1")) == 10
    for table, paper in TABLES.items():
        assert all(name in PRESETS for name in rows_of(table, "paper"))
        assert all(name in PRESETS for name in paper.fashion)
        assert all(name in paper.presets for panel in paper.panels.values() for name in panel)


def test_presets_are_found_by_name_and_pattern():
    assert list_presets("imagenet256-noise*") == [
        f"imagenet256-noise{n}" for n in ("0.1", "0.15", "0.25", "0.3")
    ] + [f"imagenet256-noise{n}-mini" for n in ("0.1", "0.15", "0.25", "0.3")]
    assert list_presets() == list(PRESETS)
    with pytest.raises(InputError, match="No preset matches"):
        list_presets("nothing*")
    with pytest.raises(InputError, match="There is no preset 'digitz'; did you mean digits"):
        get_preset("digitz")


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
