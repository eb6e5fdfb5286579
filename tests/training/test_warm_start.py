"""A run that begins with another flow's weights: what it takes, by which class, and what it refuses."""

import dataclasses

import pytest
import torch

import flowback
from flowback import Flow, InputError, ModelConfig
from flowback.data.image_set import MemoryImages
from flowback.training.warm_start import take_weights

MODEL = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=2
)


def flow_of(seed, classes=("cat", "dog"), **model):
    """Random weights everywhere: a new flow's last layers are zero."""
    torch.manual_seed(seed)
    flow = Flow(dataclasses.replace(MODEL, **{"num_classes": len(classes), **model}), classes)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow


@pytest.fixture
def source(tmp_path):
    flow = flow_of(0)
    flow.save_pretrained(tmp_path / "source")
    return flow, str(tmp_path / "source")


def test_all_weights_are_taken_and_classes_by_name(source):
    theirs, name = source
    ours = flow_of(1, ("dog", "eel", "cat"))
    take_weights(ours, name)
    for key, value in theirs.state_dict().items():
        if key.endswith("class_table"):
            value = torch.stack([value[1], value.mean(0), value[0]])
        assert torch.equal(ours.state_dict()[key], value), key


def test_classes_without_names_go_by_number(source, tmp_path):
    theirs, name = source
    ours = flow_of(1, (), num_classes=2)
    take_weights(ours, name)
    assert torch.equal(ours.blocks[1].class_table, theirs.blocks[1].class_table)


@pytest.mark.parametrize(
    ("model", "classes", "said"),
    [
        ({"width": 24}, ("cat", "dog"), r"is another flow: its blocks\.0.* is of the shape .*flowback info"),
        ({"blocks": 3}, ("cat", "dog"), r"is another flow: its blocks\.2.* is not there"),
        ({"num_classes": 0}, (), r"has 2 classes, this run none; a flow with classes"),
        ({"num_classes": 3}, (), r"has 2 classes, this run 3, and their names are not known"),
        (
            {"noise": "range"},
            ("cat", "dog"),
            r"has the noise gaussian, this run range: a flow of one .*; give --model\.noise gaussian\.$",
        ),
    ],
    ids=["width", "blocks", "unconditional", "more", "levels"],
)
def test_another_flow_is_refused(source, model, classes, said):
    with pytest.raises(InputError, match=said):
        take_weights(flow_of(1, classes, **model), source[1])


def test_a_run_begins_with_them_once(config, source, tmp_path, monkeypatch):
    """With a learning rate near 0 it stays there; when it goes on, the source may be gone."""
    theirs, name = source
    images = MemoryImages("pets", ("dog", "cat"), torch.tensor([0, 1] * 4), torch.zeros(8, 1, 8, 8).byte())
    train = dataclasses.replace(
        config.train, steps=1, lr=1e-12, min_lr=0.0, weight_decay=0.0, batch_size=4, init_from=name
    )
    model = dataclasses.replace(MODEL, num_classes=None)
    run = flowback.RunConfig(model, train=train)
    result = flowback.train(run, images, tmp_path / "run")
    assert result.config.train.init_from == name
    found = result.flow.blocks[0].class_table
    torch.testing.assert_close(found, theirs.blocks[0].class_table.flip(0), rtol=0, atol=1e-9)
    (tmp_path / "source").rename(tmp_path / "gone")
    longer = dataclasses.replace(run, train=dataclasses.replace(train, steps=2))
    assert flowback.train(longer, images, tmp_path / "run").metrics["step"] == 2
    with pytest.raises(InputError):
        flowback.train(longer, images, tmp_path / "another")


def test_a_flow_with_a_range_of_levels_begins_one_with_another_range_alone(tmp_path):
    theirs, ours = flow_of(0, noise="range"), flow_of(1, noise="range", noise_max=0.5)
    theirs.save_pretrained(tmp_path)
    take_weights(ours, str(tmp_path))
    weight = ours.blocks[1].level_embedding.up.weight
    assert torch.equal(weight, theirs.blocks[1].level_embedding.up.weight)
    with pytest.raises(
        InputError, match=r"has the noise range, this run gaussian.*give --model\.noise range"
    ):
        take_weights(flow_of(1), str(tmp_path))
