import dataclasses
import json
import shutil

import pytest

import flowback as library
from flowback import checkpoint, get_preset


def test_photographs_train_sample_classify(flowback, small, photos, tmp_path):
    """The whole job on a folder of colour photographs, from the command line."""
    out = tmp_path / "run"
    code, printed, err = flowback(
        "train",
        "folder-32-reverse",
        "--data.path",
        photos,
        "--out",
        out,
        "--json",
        tmp_path / "train.json",
        *small,
    )
    assert code == 0, err
    assert str(out) in printed
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["result"]["step"] == 4
    assert "test_top1_gradient" in result["result"]
    assert result["environment"]["versions"]["torch"]
    config = checkpoint.load_config(out)
    assert (config.model.num_classes, config.model.channels, config.alignment.strategy) == (2, 3, "reverse")

    code, _, err = flowback("sample", out, "--out", tmp_path / "samples", "--count", 4)
    assert code == 0, err
    assert len(list((tmp_path / "samples").rglob("*.png"))) >= 4
    code, printed, err = flowback("classify", out, "--json", tmp_path / "classify.json")
    assert code == 0, err
    assert "top-1" in printed or "top1" in printed


@pytest.mark.parametrize("preset", ["digits", "digits-reverse"])
def test_python_gives_the_figures_of_the_command_line(flowback, tmp_path, preset):
    """Bit for bit; what depends on the clock or on the process is left out."""
    options = {
        "steps": 4,
        "batch_size": 8,
        "log_every": 2,
        "save_every": 2,
        "eval_every": 2,
        "eval_images": 8,
    }
    words = [word for name, value in options.items() for word in (f"--train.{name.replace('_', '-')}", value)]
    code, _, err = flowback("train", preset, "--out", tmp_path / "shell", *words, "--train.device", "cpu")
    assert code == 0, err
    config = get_preset(preset).config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **options, device="cpu"))
    result = library.train(config, out=tmp_path / "python")

    def figures(row):
        clock = ("images_per_second", "tflops", "seconds", "peak_memory")
        return {name: value for name, value in row.items() if name not in clock}

    shell, python = (
        [figures(json.loads(line)) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("shell", "python")
    )
    assert len(shell) == 2
    assert shell == python
    assert shell[-1] == figures(result.metrics)
    assert checkpoint.load_config(tmp_path / "shell") == result.config
    assert result.config.classes == tuple("0123456789")


def test_running_again_resumes(flowback, small, tmp_path):
    words = ("train", "digits", "--out", tmp_path / "run", *small)
    assert flowback(*words)[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    code, out, _ = flowback(*words, "--train.steps", 6)
    assert code == 0
    assert "after 6 steps, 48 images" in out
    table = [line.split("\t")[0] for line in out.splitlines() if "\t" in line and line[0] != "#"]
    assert table[0] == "test nll (nats/dim)"
    assert len(table) == 5  # there is no exhaustive rule, and no distance
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)
    assert library.load(tmp_path / "run").config.num_classes == 10


def test_yaml_is_between_the_preset_and_the_options(flowback, tmp_path):
    (tmp_path / "my.yaml").write_text("train: {lr: 0.5, seed: 7}\nmodel: {width: 128}\n")
    code, out, _ = flowback(
        "train", "digits", "--config", tmp_path / "my.yaml", "--train.seed", 8, "--dry-run"
    )
    assert code == 0
    config = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert config["train"]["lr"] == 0.5
    assert config["train"]["seed"] == 8
    assert config["model"]["width"] == 128
    assert config["model"]["blocks"] == 4


def test_dry_run_prints_the_size_and_writes_nothing(flowback, tmp_path):
    code, out, _ = flowback("train", "imagenet64-reverse", "--dry-run", "--out", tmp_path / "run")
    assert code == 0
    assert "parameters (M)" in out
    assert "memory" in out
    assert not (tmp_path / "run").exists()


def test_dry_run_looks_at_the_images_and_tries_a_step(flowback, photos, small, tmp_path, monkeypatch):
    folder, cache = tmp_path / "photos", tmp_path / "cache"
    monkeypatch.setenv("FLOWBACK_CACHE", str(cache))
    shutil.copytree(photos, folder)
    broken = folder / "china" / "broken.jpg"
    broken.write_bytes(b"no picture")
    words = (
        "train",
        "folder-32-reverse",
        *small,
        "--data.path",
        folder,
        "--dry-run",
        "--out",
        tmp_path / "run",
    )
    code, _, error = flowback(*words)
    assert code == 2
    assert "broken.jpg" in error
    code, out, _ = flowback(*words, "--data.bad-images", "skip", "--data.holdout", 0.2)
    assert code == 0
    rows = dict(line.split("\t")[:2] for line in out[out.rindex("}") :].splitlines()[3:])
    train, test = (int(rows[f"{part} images"].split()[0]) for part in ("training", "test"))
    assert train + test == 48
    assert (rows["size"], rows["classes"]) == ("32x32x3", "2 classes (0 = china, 1 = flower)")
    assert rows["files left out"].startswith("china/broken.jpg (")
    assert float(rows["images/s, by a step that was tried"]) > 0
    assert "time on this device, one process" in rows
    assert float(rows["estimated memory, one process (GiB)"]) > 0.1
    assert not (tmp_path / "run").exists()
    assert not cache.exists()


BAD = {
    "preset": (["digitz"], "There is no preset 'digitz'; did you mean digits"),
    "option": (["digits", "--train.stepz", "3"], "--train.steps"),
    "patch": (["digits", "--model.patch-size", "3"], "not divisible by --model.patch-size 3"),
    "head": (["digits", "--model.width", "33"], "--model.width 33 is not divisible by --model.head-dim 32"),
    "layers": (
        ["digits", "--model.layers", "1,4"],
        "--model.layers 1,4 names 2 blocks, and --model.blocks is 4",
    ),
    "classes": (["digits", "--model.num-classes", "7"], "--model.num-classes is 7, but"),
    "location": (
        ["digits-reverse", "--alignment.locations", "9", "1"],
        "(9, 1) is outside the model; blocks go from 1 to 4",
    ),
    "weight": (["digits", "--alignment.weight", "-1"], "must not be negative"),
    "twice": (["digits-reverse", "--alignment.locations", "1", "1", "1", "1"], "repeats a location"),
    "yaml key": (["digits", "--config", "bad.yaml"], "Unknown option train.stepz; did you mean steps"),
    "yaml missing": (["digits", "--config", "none.yaml"], "none.yaml cannot be read"),
    "folder": (["folder-32", "--data.path", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(flowback, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("train: {stepz: 3}\n")
    code, out, err = flowback("train", *words, "--out", tmp_path / "run")
    assert code == 2, (out, err)
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
