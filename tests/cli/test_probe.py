from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from flowback import Flow, ModelConfig, RunConfig, checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = RunConfig(
        ModelConfig(
            image_size=8, channels=1, patch_size=2, width=16, blocks=2, layers=2, head_dim=8, num_classes=10
        )
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save(folder, config, Flow(config.model).state_dict())
    return folder


SMALL = ("--train-limit", 120, "--test-limit", 40)


def test_table_plot_and_record_of_all_locations(flowback, model, tmp_path):
    code, text, _ = flowback("probe", model, *SMALL, "--out", tmp_path, "--json", tmp_path / "a.json")
    assert code == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert list(record["figures"]["locations"]) == ["1.1", "1.2", "2.1", "2.2"]
    for row in record["figures"]["locations"].values():
        assert {"linear", "penalty", "knn", "cknna"} == set(row)
    assert record["figures"]["best_linear"] > 0.3  # even random features of digits tell much
    assert record["settings"]["test"]["count"] == 40
    assert "Training-free classification" in text
    with Image.open(tmp_path / "probe.png") as picture:
        assert min(picture.size) > 300


def test_some_locations_without_an_encoder(flowback, model, tmp_path):
    arguments = ("--locations", "1", "2", "2", "1", "--encoder", "None", "--out", tmp_path)
    code, _, _ = flowback("probe", model, *SMALL, *arguments)
    assert code == 0
    locations = json.loads((tmp_path / "probe.json").read_text())["figures"]["locations"]
    assert list(locations) == ["1.2", "2.1"]
    assert locations["1.2"]["cknna"] is None


def test_bad_input(flowback, model, tmp_path):
    cases = [
        ((*SMALL, "--locations", "3", "1"), "(3, 1) is outside the model"),
        (("--train-limit", 0), "at least 1"),
        ((*SMALL, "--encoder", "nothing"), "Unknown"),
    ]
    for arguments, sentence in cases:
        code, _, error = flowback("probe", model, *arguments, "--out", tmp_path)
        assert code == 2, arguments
        assert sentence in error
