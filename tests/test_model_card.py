"""A published flow tells what it is, and nothing of the machine it was trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowback import Card, DataConfig, Flow, InputError, ModelConfig, RunConfig, checkpoint
from flowback.model_card import about, public_config, read_record
from flowback.sampling.block_plan import weights_hash

MODEL = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=2
)


@pytest.fixture
def flow():
    made = Flow(MODEL, ("cat", "/m/dog")).eval()
    made.run = RunConfig(MODEL, DataConfig("folder", Path("/home/me/pets"), limit=30), classes=made.classes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def record_of(flow, tmp_path, **more):
    """A file of an evaluation."""
    settings = {
        "checkpoint": "/home/me/runs/pets",
        "weights_sha256": weights_hash(flow),
        "samples": 20,
        "guidance": 0.5,
        "held_out": {"images": "pets-test", "limit": None, "draws": 3},
        "reference": "pets-train",
        "reference_images": 30,
    }
    environment = {
        "device": "cpu: some",
        "commit": "0" * 40,
        "command": "flowback evaluate /home/me/runs/pets --samples 20",
        "versions": {"torch": "2.9"},
    }
    figures = {"nll": -0.5, "nll_error": 0.01, "top1_gradient": 0.75, "fd_efficientnet_lite0": 40.0}
    file = tmp_path / "record.json"
    parts = {"figures": figures, "settings": settings, "environment": environment, "warnings": ["few images"]}
    file.write_text(json.dumps({**parts, **more}))
    return file


def test_a_published_folder(flow, tmp_path):
    card = Card("me/pets", record_of(flow, tmp_path), "mit", guidance=0.5, columns=3)
    flow.save_pretrained(tmp_path / "out", card)
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(files) == {"config.json", "model.safetensors", *checkpoint.CARD_FILES}
    assert not any(b"/home/me" in content for content in files.values())
    text = files["README.md"].decode()
    for part in (
        "license: mit",
        "# me/pets\n\nA TARFlow of 8,384 parameters for images of 8x8x1 in 2 classes",
        "trained on 30 images of a folder called pets",
        'from_pretrained("me/pets")',
        "| nll of the noised test images (nats/dim) | -0.5 ± 0.01 |",
        "| top-1 accuracy, gradient rule | 75.0 % |",
        "all images of pets-test, 3 draws",
        "samples: 20, guidance 0.5",
        "cpu: some; torch 2.9; commit 000",
        "- few images",
        "zhai2025normalizing",
    ):
        assert part in text
    assert "chen2026flowing" not in text  # it was not aligned
    assert json.loads(files["evaluation.json"])["settings"]["checkpoint"] == "pets"
    with Image.open(io.BytesIO(files["samples.png"])) as picture:
        assert picture.size[1] == 2 * (64 + 2) + 2
    loaded = Flow.from_pretrained(tmp_path / "out")
    assert loaded.classes == ("cat", "/m/dog")  # no path, though it looks like one
    assert loaded.run.data.path == Path("pets")
    own = flow.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())


def test_half_the_size(flow, tmp_path):
    card = Card("pets", record_of(flow, tmp_path), columns=0)
    flow.save_pretrained(tmp_path / "half", card, torch.float16)
    loaded = Flow.from_pretrained(tmp_path / "half")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert all(
        torch.equal(value, flow.state_dict()[name].half().float())
        for name, value in loaded.state_dict().items()
    )
    assert "before the weights were rounded to fp16" in (tmp_path / "half" / "README.md").read_text()
    card = Card("pets", record_of(loaded, tmp_path), columns=0)
    flow.save_pretrained(tmp_path / "half", card, torch.float16)
    assert "before the weights were rounded" not in (tmp_path / "half" / "README.md").read_text()


def test_a_record_of_other_weights_is_refused(flow, tmp_path):
    record = record_of(Flow(MODEL), tmp_path)
    with pytest.raises(InputError, match=r"record\.json is the record of other weights"):
        flow.save_pretrained(tmp_path / "out", Card("pets", record, columns=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"report": 3}', "no JSON", '{"figures": {}}'])
def test_what_is_no_record(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json is no evaluation record"):
        read_record(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"b\.json cannot be read"):
        read_record(tmp_path / "b.json")


def test_the_record_of_a_row(flow, tmp_path):
    whole = json.loads(record_of(flow, tmp_path).read_text())
    (tmp_path / "row.json").write_text(json.dumps({"preset": "fashion", "report": whole}))
    assert read_record(tmp_path / "row.json") == whole


def test_a_card_is_not_lost(flow, tmp_path):
    """Somebody may have written more into it."""
    flow.save_pretrained(tmp_path / "out", Card("pets", columns=0))
    with pytest.raises(InputError, match=r"other than a checkpoint \(.*README.md\)"):
        flow.save_pretrained(tmp_path / "out")
    assert "Not measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_flow_of_unknown_data_says_so():
    assert about(RunConfig(MODEL, DataConfig("none"))).endswith("in 2 classes; its data are not recorded.")
    assert public_config(RunConfig(MODEL, DataConfig("none"))) == RunConfig(MODEL, DataConfig("none"))


@pytest.mark.parametrize("name", checkpoint.packaged())
def test_flows_that_come_along(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flow = Flow.from_pretrained(name)
    assert "Fashion-MNIST" in flow.about
    assert flow.classes[9] == "Ankle boot"
    folder = checkpoint.PACKAGED / name
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        *checkpoint.CARD_FILES,
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    record = read_record(folder / "evaluation.json")
    before = "before the weights were rounded" in (folder / "README.md").read_text()
    assert before or record["settings"]["weights_sha256"] == weights_hash(flow)
    assert not any(b"/work" in file.read_bytes() for file in folder.glob("*.*[nd]"))  # no path of a machine
    (tmp_path / name).mkdir()  # a folder of that name comes first
    with pytest.raises(InputError, match="No checkpoint at"):
        Flow.from_pretrained(name)


def test_there_are_such_flows():
    assert {"fashion", "fashion-reverse"} <= set(checkpoint.packaged())
    with pytest.raises(
        InputError, match=r"No checkpoint at fashon: there is no such folder; did you mean fashion"
    ):
        checkpoint.fetch("fashon")
