"""What counts as done, what is refused, and that one row's failure stops no other."""

import json
import logging
import math
import pickle
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flowback import InputError, ModelConfig, RunConfig, SampleConfig, TrainConfig, reproduce
from flowback.config import AlignmentConfig
from flowback.errors import Interrupted
from flowback.folder_lock import folder_lock
from flowback.presets import PRESETS, TABLES, PaperTable, Preset
from flowback.tables import charts, fill, row_run, rows_of

ENVIRONMENT = {"device": "cpu: test", "commit": "abc"}


@pytest.fixture
def runs(monkeypatch):
    """A table of two rows on digits, whose training and evaluation only take notes: (trained, measured)."""
    model = ModelConfig(
        image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=10
    )
    none = RunConfig(model, train=TrainConfig(steps=4, batch_size=8))
    reverse = replace(none, alignment=AlignmentConfig(strategy="reverse", locations=((2, 1),), hidden=8))
    monkeypatch.setitem(PRESETS, "tiny-mini", Preset(none, "tiny"))
    monkeypatch.setitem(PRESETS, "tiny-reverse-mini", Preset(reverse, "tiny, reverse"))
    monkeypatch.setitem(TABLES, "tiny", PaperTable("Tiny", ("fid",), (("tiny", 2.0), ("tiny-reverse", 1.0))))
    trained, measured = [], []

    def train(config, out, description):
        folder = out
        trained.append((folder.name, description))
        rows = [
            {"step": s, "images": 8 * s, "seconds": 0.5 * s, "test_nll": -s / config.train.steps}
            for s in (2, config.train.steps)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(flow=config)

    def measure(config, images, test, settings):
        measured.append(settings)
        aligned = config.alignment.active
        figures = {"nll": -1.0 - config.train.seed - 0.5 * aligned, "top1_gradient": 0.5}
        return {
            "kind": "evaluate",
            "figures": figures,
            "settings": {},
            "warnings": [],
            "environment": ENVIRONMENT,
        }

    monkeypatch.setattr(fill, "draw", lambda table, folder: None)  # it takes longer than all the rest
    monkeypatch.setattr(row_run, "train", train)
    monkeypatch.setattr(row_run, "_measure", measure)
    return trained, measured


def test_a_table_is_filled_in_and_what_is_done_is_not_done_again(runs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fill, "draw", charts.draw)
    trained, _ = runs
    with caplog.at_level(logging.INFO, "flowback"):
        table = reproduce("tiny", "mini", 2, tmp_path)
    assert [name for name, _ in trained] == [
        *("tiny-mini-seed0", "tiny-mini-seed1", "tiny-reverse-mini-seed0", "tiny-reverse-mini-seed1")
    ]
    assert "Row 3 of 4, seed 0: tiny-reverse-mini" in caplog.text
    row = table.row("tiny-reverse-mini")
    assert (row.seeds, row.values["nll"], row.mean["nll"]) == ([0, 1], [-1.5, -2.5], -2.0)
    assert row.baseline == "tiny-mini"
    assert table.title == "small flows on digits, for: Tiny"
    assert row.difference["nll"].values == [-0.5, -0.5]
    assert all(Path(file).is_file() for file in row.records)
    assert json.loads((tmp_path / "tiny-mini.json").read_text())["rows"][1]["seeds"] == [0, 1]
    assert (tmp_path / "tiny-mini.svg").is_file()
    assert (tmp_path / "tiny-mini-training.svg").is_file()
    assert (tmp_path / "tiny-mini-seconds.svg").is_file()
    monkeypatch.setattr(fill, "draw", lambda table, folder: None)
    again = reproduce("tiny", "mini", range(3), tmp_path)
    assert [name for name, _ in trained[4:]] == ["tiny-mini-seed2", "tiny-reverse-mini-seed2"]
    assert again.row("tiny-mini").values["nll"][:2] == table.row("tiny-mini").values["nll"]


def test_the_table_is_written_after_every_row(runs, tmp_path, monkeypatch):
    seen = []
    measure = row_run._measure

    def look(*arguments):
        file = tmp_path / "tiny-mini.json"
        seen.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0)
        return measure(*arguments)

    monkeypatch.setattr(row_run, "_measure", look)
    reproduce("tiny", "mini", 1, tmp_path)
    assert seen == [0, 1]


def test_a_short_run_never_passes_for_the_result(runs, tmp_path):
    trained, _ = runs
    reproduce("tiny", "mini", 1, tmp_path, steps=3)
    with pytest.raises(
        InputError, match=r"holds a run of other settings: config\.train\.steps was 3, now 4\. Give"
    ) as caught:
        reproduce("tiny", "mini", 1, tmp_path)
    assert "tiny-mini-seed0" in str(caught.value)
    assert len(trained) == 2
    reproduce("tiny", "mini", 1, tmp_path, redo=True)
    assert len(trained) == 4
    assert (
        json.loads((tmp_path / "runs/tiny-mini-seed0/settings.json").read_text())["config"]["train"]["steps"]
        == 4
    )


def test_a_run_that_was_stopped_is_not_taken_up_with_other_settings(runs, tmp_path, monkeypatch):
    def stopped(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(row_run, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            reproduce("tiny", "mini", 1, tmp_path, steps=3)
    with pytest.raises(InputError, match="steps was 3, now 4"):
        reproduce("tiny", "mini", 1, tmp_path)
    reproduce("tiny", "mini", 1, tmp_path, steps=3)


OTHER = {
    "samples": ({"samples": 5}, "evaluation.options.samples was 1000, now 5"),
    "guidance": ({"guidance": 1.0}, "evaluation.sampling.guidance was 0.3, now 1.0"),
    "search": ({"search": (0.0, 1.0)}, "evaluation.options.search was [], now [0.0, 1.0]"),
    "sampling": (
        {"sampling": SampleConfig(denoise=False)},
        "evaluation.sampling.denoise was True, now False",
    ),
    "inception": (
        {"inception_weights": Path(__file__)},  # any file: nothing reads it here
        "evaluation.options.protocol was none, now adm",
    ),
}


@pytest.mark.parametrize(("options", "said"), OTHER.values(), ids=OTHER)
def test_another_evaluation_is_made_again_and_what_differs_is_said(runs, tmp_path, caplog, options, said):
    _, measured = runs
    reproduce("tiny", "mini", 1, tmp_path)
    with caplog.at_level(logging.INFO, "flowback"):
        reproduce("tiny", "mini", 1, tmp_path, **options)
    assert said in caplog.text
    assert len(measured) == 4
    assert measured[0] != measured[2]


def test_another_preset_or_other_images_are_refused(runs, tmp_path, monkeypatch):
    reproduce("tiny", "mini", 1, tmp_path)
    preset = PRESETS["tiny-reverse-mini"]
    changed = replace(preset.config, alignment=replace(preset.config.alignment, weight=0.2))
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "tiny-reverse-mini", replace(preset, config=changed))
        with pytest.raises(InputError, match=r"config\.alignment\.weight was 0\.1, now 0\.2"):
            reproduce("tiny", "mini", 1, tmp_path)
    settings = tmp_path / "runs/tiny-mini-seed0/settings.json"
    stored = json.loads(settings.read_text())
    settings.write_text(json.dumps({**stored, "images": "others"}))
    with pytest.raises(InputError, match="images was others, now"):
        reproduce("tiny", "mini", 1, tmp_path)
    settings.write_text(json.dumps({**stored, "format": 0}))
    with pytest.raises(InputError, match="format was 0, now 1"):
        reproduce("tiny", "mini", 1, tmp_path)
    settings.unlink()
    with pytest.raises(InputError, match=r"was not made by this command, or its settings\.json is damaged"):
        reproduce("tiny", "mini", 1, tmp_path)


def test_a_setting_that_is_newer_than_the_run_stood_at_its_default(runs, tmp_path):
    trained, _ = runs
    reproduce("tiny", "mini", 1, tmp_path)
    for settings in tmp_path.glob("runs/*/settings.json"):
        stored = json.loads(settings.read_text())
        del stored["config"]["train"]["ema_more"]
        settings.write_text(json.dumps(stored))
    reproduce("tiny", "mini", 1, tmp_path)
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("Step 3: the gradient is not finite."), "Step 3: the gradient is not finite."),
        (TypeError("a defect"), "TypeError: a defect"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    ],
    ids=["bad input", "a defect", "no memory"],
)
def test_a_row_that_fails_stands_in_its_cell_and_stops_no_other(runs, tmp_path, monkeypatch, error, said):
    train = row_run.train

    def diverging(config, **more):
        if not config.alignment.active:
            raise error
        return train(config, **more)

    monkeypatch.setattr(row_run, "train", diverging)
    table = reproduce("tiny", "mini", 1, tmp_path)
    assert table.row("tiny-mini").failures == {0: said}
    assert table.row("tiny-reverse-mini").values["nll"] == [-1.5]
    text = (tmp_path / "tiny-mini.md").read_text()
    assert "| tiny-mini | failed |" in text
    assert f"tiny-mini, seed 0, failed: {said}" in text
    monkeypatch.setattr(row_run, "train", train)  # mended: the row is tried again
    assert reproduce("tiny", "mini", 1, tmp_path).row("tiny-mini").seeds == [0]


@pytest.mark.parametrize("again", [False, True], ids=["at first", "read again"])
def test_a_flow_that_diverged_is_a_failure_and_a_lost_distance_a_warning(runs, tmp_path, monkeypatch, again):
    measure = row_run._measure

    def diverged(config, *arguments):
        report = measure(config, *arguments)
        lost = "fd_efficientnet_lite0" if config.alignment.active else "nll"
        return report | {"figures": {**report["figures"], lost: math.nan}}

    monkeypatch.setattr(row_run, "_measure", diverged)
    table = reproduce("tiny", "mini", 1, tmp_path)
    if again:
        table = reproduce("tiny", "mini", 1, tmp_path)
    assert table.row("tiny-mini").failures[0].startswith("its nll is not finite (see ")
    assert table.row("tiny-reverse-mini").values["nll"] == [-1.5]
    assert "tiny-reverse-mini, seed 0: fd_efficientnet_lite0 is not finite" in table.warnings[0]


def test_a_stopped_table_is_no_failed_row(runs, tmp_path, monkeypatch):
    def stopped(*arguments, **more):
        raise Interrupted("Stopped")

    monkeypatch.setattr(row_run, "train", stopped)
    with pytest.raises(Interrupted):
        reproduce("tiny", "mini", 1, tmp_path)


def test_only_one_process_fills_a_folder(runs, tmp_path):
    with folder_lock(tmp_path), pytest.raises(InputError, match="is in use by process"):
        reproduce("tiny", "mini", 1, tmp_path)


def test_other_weights_in_the_same_file_are_another_evaluation(runs, tmp_path):
    _, measured = runs
    file = tmp_path / "w.pth"
    for content, evaluations in (b"one", 2), (b"one", 2), (b"two", 4):
        file.write_bytes(content)
        reproduce("tiny", "mini", 1, tmp_path / "out", inception_weights=file)
        assert len(measured) == evaluations
    with pytest.raises(InputError, match=r"--inception-weights .*none\.pth does not exist"):
        reproduce("tiny", "mini", 1, tmp_path / "out", inception_weights=tmp_path / "none.pth")


def test_a_table_without_a_single_run_is_an_error(runs, tmp_path, monkeypatch):
    def fails(*arguments, **more):
        raise InputError("No encoder.")

    monkeypatch.setattr(row_run, "train", fails)
    with pytest.raises(InputError, match=r"No row of tiny-mini could be run: No encoder\."):
        reproduce("tiny", "mini", 1, tmp_path)


def test_rows_and_baseline_can_be_chosen(runs, tmp_path):
    table = reproduce("tiny", "mini", [7], tmp_path, rows=("*reverse*",))
    assert [row.preset for row in table.rows] == ["tiny-reverse-mini"]
    table = reproduce("tiny", "mini", [7], tmp_path, baseline="tiny-reverse-mini", note=("On 8×8 digits.",))
    assert table.row("tiny-mini").baseline == "tiny-reverse-mini"
    assert table.row("tiny-mini").difference["nll"].values == [0.5]
    assert "- On 8×8 digits.\n" in table.to_markdown()
    with pytest.raises(InputError, match="--rows nothing matches no row"):
        reproduce("tiny", "mini", 1, tmp_path, rows=("nothing",))
    with pytest.raises(InputError, match="--baseline nothing is not one of the rows"):
        reproduce("tiny", "mini", 1, tmp_path, baseline="nothing")


def test_flows_without_classes_are_not_guided(runs, tmp_path, monkeypatch):
    _, measured = runs
    for name in ("tiny-mini", "tiny-reverse-mini"):
        config = PRESETS[name].config
        free = replace(config, model=replace(config.model, num_classes=0))
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], config=free))
    reproduce("tiny", "mini", 1, tmp_path)
    assert [each["sampling"]["guidance"] for each in measured] == [0.0, 0.0]


def test_rows_of_several_commits_are_told(runs, tmp_path, monkeypatch):
    reproduce("tiny", "mini", 1, tmp_path)
    monkeypatch.setitem(ENVIRONMENT, "commit", "def")
    table = reproduce("tiny", "mini", 2, tmp_path)
    assert table.warnings == ["The rows come from several commits: abc, def."]


def test_other_code_is_refused_before_anything_runs(runs, tmp_path, monkeypatch):
    trained, _ = runs
    monkeypatch.setattr(fill, "code_hash", lambda: "old")
    reproduce("tiny", "mini", 1, tmp_path)
    monkeypatch.setattr(fill, "code_hash", lambda: "new")
    with pytest.raises(
        InputError, match=r"code was old, now new\. Give .* or --any-code to take it as it is"
    ):
        reproduce("tiny", "mini", 2, tmp_path)
    assert len(trained) == 2
    table = reproduce("tiny", "mini", 2, tmp_path, any_code=True)
    assert len(trained) == 4
    assert table.row("tiny-mini").seeds == [0, 1]


class Pool:
    """A pool whose processes are this one; what goes in and comes out is pickled as between processes."""

    broken = False

    def __init__(self, jobs, *, mp_context, initializer, initargs):
        assert mp_context.get_start_method() == "spawn"
        self.started = (jobs, initializer, initargs)
        POOLS.append(self)

    def submit(self, function, row):
        future = Future()
        try:
            if self.broken:
                raise BrokenProcessPool
            function, row = pickle.loads(pickle.dumps((function, row)))
            future.set_result(pickle.loads(pickle.dumps(function(row))))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, *, cancel_futures):
        self.started = None


POOLS = []


@pytest.fixture
def pool(monkeypatch):
    POOLS.clear()
    monkeypatch.setattr(row_run, "ProcessPoolExecutor", Pool)
    kept = []
    monkeypatch.setattr(row_run, "make_targets", lambda config, *_: kept.append(config.alignment.strategy))
    monkeypatch.setattr(row_run, "create_encoder", lambda name: name)
    monkeypatch.setattr(row_run, "Judge", lambda reference, encoder: kept.append(encoder))
    return kept


def test_rows_at_once_give_the_same_table_and_speak_into_files(runs, tmp_path, pool, capsys):
    one = reproduce("tiny", "mini", 2, tmp_path / "one")
    assert not POOLS
    said = capsys.readouterr().err
    two = reproduce("tiny", "mini", 2, tmp_path / "two", jobs=3)
    assert [row.values for row in one.rows] == [row.values for row in two.rows]
    assert len(POOLS) == 1
    assert pool == ["none", "efficientnet_lite0", "reverse", "efficientnet_lite0"]  # once, whatever the seed
    logs = sorted(file.name for file in (tmp_path / "two").rglob("*.log"))
    assert logs[:2] == ["tiny-mini-seed0.log", "tiny-mini-seed1.log"]
    assert capsys.readouterr().err == said


def test_more_jobs_than_rows_are_not_started_and_share_the_cores(runs, tmp_path, pool, monkeypatch):
    monkeypatch.setattr(row_run, "cpu_cores", lambda: 8)
    seen = []
    shutdown = Pool.shutdown
    monkeypatch.setattr(
        Pool, "shutdown", lambda self, **more: (seen.append(self.started), shutdown(self, **more))
    )
    reproduce("tiny", "mini", 1, tmp_path, jobs=9)
    assert seen == [(2, torch.set_num_threads, (4,))]


def test_a_row_that_dies_beside_others_says_how_to_go_on(runs, tmp_path, pool, monkeypatch):
    monkeypatch.setattr(Pool, "broken", True)
    with pytest.raises(InputError, match=r"A process that ran a row died.*fewer --jobs"):
        reproduce("tiny", "mini", 1, tmp_path, jobs=2)


def test_a_figure_of_several_sizes_needs_both_sets(tmp_path):
    with pytest.raises(InputError, match="table9 needs its images: give --data, or --scale mini"):
        reproduce("table9", out=tmp_path / "results")
    with pytest.raises(
        InputError, match=r"No row of table9 can be run: This row needs its latents: give --latents\."
    ):
        reproduce("table9", out=tmp_path / "results", data=tmp_path)
    assert not (tmp_path / "results").exists()


def test_tables_that_take_no_run_are_shown(tmp_path):
    speed = reproduce("table5", out=tmp_path)
    assert [row.published["iterations_per_second"] for row in speed.rows] == [2.11, 1.93, 1.87]
    assert "benchmarks/alignment_step.py" in (tmp_path / "table5.md").read_text()
    for row in reproduce("table6", out=tmp_path).rows:
        assert row.mean == row.published  # the presets are what the paper says


def test_tables_without_rows_at_a_scale_say_so():
    with pytest.raises(InputError, match="differ in their encoder alone and have no small siblings"):
        rows_of("table8", "mini")
    with pytest.raises(InputError, match="tarflow has no rows on Fashion-MNIST"):
        rows_of("tarflow", "fashion")
    with pytest.raises(InputError, match="There is no table 'table99'; did you mean table"):
        rows_of("table99")
    with pytest.raises(InputError, match="--scale big is not one of paper, mini, fashion"):
        rows_of("table1", "big")
