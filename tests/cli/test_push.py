"""Flows by name on the command line: drawn, evaluated, published."""

import json

import pytest
from PIL import Image

from flowback import Flow, InputError, ModelConfig, RunConfig, checkpoint
from flowback.cli.options import names_flow

MODEL = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=2
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    flow = Flow(MODEL)
    checkpoint.save(tmp_path / "run" / "checkpoints" / "step-00000001", RunConfig(MODEL), flow.state_dict())
    return tmp_path / "run"


def test_a_flow_that_comes_along_is_drawn_and_says_what_it_is(flowback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = flowback("sample", "fashion", "--count", 3)
    assert code == 0, err
    assert "fashion: A TARFlow of 0.4 M parameters for images of 28x28x1 in 10 classes, trained on" in out
    assert len(list((tmp_path / "samples" / "fashion").glob("*.png"))) == 3
    with Image.open(tmp_path / "samples" / "fashion.png") as picture:
        assert picture.height > 60
    assert "samples/fashion.png" in out.replace("\\", "/")


def test_a_folder_that_is_named_gets_no_picture(flowback, run, tmp_path):
    code, _out, err = flowback("sample", run, "--count", 2, "--out", tmp_path / "here")
    assert code == 0, err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here", "run"]


def test_a_mistyped_name(flowback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = flowback("sample", "fashoin")
    assert code == 2
    assert "No checkpoint at fashoin: there is no such folder; did you mean fashion or" in err
    assert list(tmp_path.iterdir()) == []


def test_other_verbs_take_names(flowback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_flow(checkpoint.Path("fashion"))
    code, _out, err = flowback("info", "fashion", "--json", "info.json")
    assert code == 0, err
    assert json.loads((tmp_path / "info.json").read_text())["settings"]["data"]["name"] == "fashion-mnist"


def test_what_would_be_pushed(flowback, run, tmp_path):
    code, out, err = flowback("push", run, "me/mine", "--out", "look", "--licence", "mit", "--half")
    assert code == 0, err
    assert "look: what would be uploaded as me/mine" in out
    assert "The card has no figures" in out
    assert "license: mit" in (tmp_path / "look" / "README.md").read_text()
    assert Flow.from_pretrained(tmp_path / "look").config == MODEL
    assert not list((tmp_path / "look").glob("training*"))


def test_a_push_asks_before_it_works(flowback, run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = flowback("push", run, "me/mine")
    assert code == 2
    assert "does not answer; connect, and try again" in err
    code, _, err = flowback("push", run, "mine")
    assert "mine is no name on the Hub; give owner/name." in err
    folder = checkpoint.resolve(run)
    code, _, err = flowback("push", folder, "me/mine", "--out", folder)
    assert code == 2
    assert "is the checkpoint itself; choose another folder" in err


def test_names_that_can_only_be_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"someone/cats.*switched off"):
        names_flow(checkpoint.Path("someone/cats"))
