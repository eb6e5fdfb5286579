from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from flowback import Flow, ModelConfig, RunConfig, checkpoint

TINY = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 16, "blocks": 2, "layers": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of a flow for the digits, with random class tables."""
    config = RunConfig(
        ModelConfig(
            image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=10
        )
    )
    torch.manual_seed(0)
    flow = Flow(config.model)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save(folder, config, flow.state_dict())
    return folder


def test_both_rules_on_the_checkpoints_own_data(flowback, model, tmp_path):
    out = tmp_path / "figures.json"
    code, text, _ = flowback("classify", model, "--json", out, "--out", tmp_path)
    assert code == 0
    record = json.loads(out.read_text())
    for rule in ("gradient", "exhaustive"):
        figures = record["figures"][rule]
        assert 0 <= figures["top1"] <= figures["top5"] <= 1
        assert sum(map(sum, figures["confusion"])) == 360
        assert len(figures["per_class"]) == 10
        with Image.open(tmp_path / f"confusion-{rule}.png") as picture:
            assert min(picture.size) > 300
        assert rule in text
    assert record["settings"]["images"] == "digits-test"
    assert record["settings"]["noise"] is True


def test_options_reach_the_rule(flowback, model, tmp_path):
    arguments = ("--method", "gradient", "--limit", 50, "--draws", 2, "--no-noise", "--split", "train")
    code, _, _ = flowback("classify", model, *arguments, "--out", tmp_path)
    assert code == 0
    record = json.loads((tmp_path / "classify.json").read_text())
    assert list(record["figures"]) == ["gradient"]
    assert record["settings"]["count"] == 50
    assert record["settings"]["images"] == "digits-train"
    assert record["settings"]["draws"] == 2


@pytest.fixture(scope="module")
def ranged(tmp_path_factory):
    """A checkpoint of a flow for the digits with a range of noise levels."""
    config = RunConfig(ModelConfig(**TINY, num_classes=10, noise="range", noise_min=0.05, noise_max=0.5))
    torch.manual_seed(0)
    flow = Flow(config.model)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("ranged") / "checkpoint"
    checkpoint.save(folder, config, flow.state_dict())
    return folder


def test_several_noise_levels(flowback, ranged, tmp_path):
    words = ("--noise", "0.05,0.2,0.5", "--method", "gradient", "--limit", 60, "--choose-on", 40)
    code, text, err = flowback("classify", ranged, *words, "--out", tmp_path)
    assert (code, err) == (0, err)
    record = json.loads((tmp_path / "classify.json").read_text())
    figures = record["figures"]["gradient"]
    assert record["settings"]["noise"] == [0.05, 0.2, 0.5]
    rows = figures["by_noise"]
    assert [row["noise"] for row in rows] == [0.05, 0.2, 0.5]
    best = max(rows, key=lambda row: row["training_top1"])
    assert (figures["noise"], figures["top1"], figures["chosen_on"]) == (best["noise"], best["top1"], 40)
    assert text.count("chosen") == 1
    assert "all, averaged" in text


def test_one_noise_level(flowback, ranged, tmp_path):
    words = ("--noise", "0.05", "--method", "gradient", "--limit", 20)
    assert flowback("classify", ranged, *words, "--out", tmp_path)[0] == 0
    record = json.loads((tmp_path / "classify.json").read_text())
    assert record["settings"]["noise"] == [0.05]
    assert "by_noise" not in record["figures"]["gradient"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--noise", "0.2,0.7"), "The noise level 0.7 is outside the range"),
        (("--noise", "0.2,0.2"), "--noise 0.2,0.2 repeats a level"),
        (("--noise", "0.2;0.3"), "are no numbers with commas between"),
        (("--noise", "0.2", "--no-noise"), "--noise and --no-noise exclude each other"),
        (("--noise", "0.2,0.3", "--choose-on", 0), "--choose-on must be at least 1."),
        (("--noise", "0.2,0.3", "--images", "."), "--images takes one noise level"),
    ],
)
def test_bad_noise_levels(flowback, ranged, tmp_path, words, message):
    code, _, error = flowback("classify", ranged, *words, "--out", tmp_path / "out")
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_by_default_the_record_lies_beside_the_checkpoint(flowback, model):
    assert flowback("classify", model, "--limit", 10)[0] == 0
    assert (model / "evaluation" / "classify.json").is_file()
    assert Flow.from_pretrained(model).config.num_classes == 10  # and the checkpoint stays one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seed", -1), "--seed -1 is out of range; it goes from 0 to 4294967295."),
        (("--step-size", "nan"), "--step-size nan must be finite and above 0."),
        (("--draws", 0), "--draws and --steps must be at least 1."),
    ],
)
def test_bad_options(flowback, model, tmp_path, words, message):
    code, out, err = flowback("classify", model, "--limit", 5, *words, "--out", tmp_path / "out")
    assert (code, out, err) == (2, "", f"flowback: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["classify", "evaluate", "probe"])
def test_a_folder_that_cannot_be_made_is_said_before_the_work(flowback, model, tmp_path, verb):
    (tmp_path / "file").write_text("something else")
    code, out, err = flowback(verb, model, "--device", "cpu", "--out", tmp_path / "file" / "out")
    sentence = f"--out {tmp_path / 'file' / 'out'} cannot be written: {tmp_path / 'file'} is not a folder."
    assert (code, out, err) == (2, "", f"flowback: {sentence}\n")


@pytest.fixture
def named(tmp_path):
    """A checkpoint that knows its classes by name."""

    def make(*classes):
        config = RunConfig(
            ModelConfig(**{**TINY, "channels": 3, "num_classes": len(classes)}), classes=classes
        )
        checkpoint.save(tmp_path / "named", config, Flow(config.model).state_dict())
        return tmp_path / "named"

    return make


def test_a_class_without_images_has_no_accuracy(flowback, named, photos, tmp_path):
    model = named("china", "flower", "zebra")
    code, text, _ = flowback("classify", model, "--data", photos, "--limit", 4, "--out", tmp_path)
    assert code == 0
    (row,) = (line for line in text.splitlines() if "zebra" in line)
    assert row.count("–") == 3  # all rules
    assert "nan" not in text
    figures = json.loads((tmp_path / "classify.json").read_text())["figures"]["gradient"]
    assert figures["per_class"]["zebra"] is None
    assert len(figures["confusion"]) == 3


def test_classes_that_the_model_does_not_know_are_refused(flowback, named, photos, tmp_path):
    model = named("flower", "cat")
    for verb in ("classify", "evaluate", "probe"):
        code, _, error = flowback(verb, model, "--data", photos, "--out", tmp_path / "out")
        assert code == 2
        assert "china" in error
        assert not (tmp_path / "out").exists()


def test_bad_input(flowback, model, photos, tmp_path):
    config = ModelConfig(
        image_size=8, channels=1, patch_size=4, width=16, blocks=1, layers=1, head_dim=8, num_classes=0
    )
    bare = tmp_path / "bare"
    checkpoint.save(bare, RunConfig(config), Flow(config).state_dict())
    cases = [
        ((bare,), "is an unconditional model"),
        ((model, "--data", photos), "2 classes, the model 10"),
        ((model, "--data", tmp_path / "nowhere"), "nowhere"),
        ((model, "--images", tmp_path / "nowhere"), "nowhere is neither a picture nor a folder of pictures"),
        ((model, "--draws", 0), "at least 1"),
        ((model, "--limit", 0), "at least 1"),
        ((tmp_path / "nowhere",), "does not exist"),
    ]
    for arguments, sentence in cases:
        code, _, error = flowback("classify", *arguments)
        assert code == 2, arguments
        assert sentence in error
        assert error.count("\n") == 1


def test_pictures_of_ones_own(flowback, named, photos, tmp_path):
    """A folder, and one picture of it: the same answer."""
    model = named("china", "flower")
    code, out, err = flowback("classify", model, "--images", photos, "--limit", 3, "--out", tmp_path / "all")
    assert (code, err) == (0, err)
    stored = json.loads((tmp_path / "all/predictions.json").read_text())
    assert len(stored["predictions"]) == 3
    assert not (tmp_path / "all/classify.json").exists()
    first = stored["predictions"][0]
    code, out, _ = flowback("classify", model, "--images", photos / first["image"], "--out", tmp_path / "one")
    (one,) = json.loads((tmp_path / "one/predictions.json").read_text())["predictions"]
    assert one["label"] == first["label"]
    assert one["log_prob"] == pytest.approx(first["log_prob"], rel=1e-5)  # fp32, other batch sizes
    assert f"{first['label']}\t" in out
    code, _, err = flowback("classify", model, "--images", photos, "--method", "both", "--out", tmp_path)
    assert code == 2
    assert "--images takes one rule" in err


def test_a_flow_by_name_leaves_its_report_here(flowback, tmp_path, monkeypatch):
    """The overview's example, which must not write into the package."""
    monkeypatch.chdir(tmp_path)
    Image.new("L", (28, 28), 90).save("photo.png")
    code, out, err = flowback("classify", "fashion", "--images", "photo.png", "--device", "cpu")
    assert code == 0, err
    assert "Written: evaluation/fashion/predictions.csv" in out
    assert (tmp_path / "evaluation" / "fashion" / "predictions.json").is_file()
