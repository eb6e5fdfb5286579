"""What a flow says of single images is what the rules and the likelihood say of the whole set."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from flowback import Flow, InputError, ModelConfig, RunConfig, classify
from flowback.config import CodecConfig
from flowback.data.image_set import MemoryImages
from flowback.evaluation.held_out import likelihood
from flowback.evaluation.predictions import Predictions, open_pictures, predict

MODEL = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=3
)


def flow_of(config, classes=()):
    """Random weights everywhere, seed 0: a new flow's last layers are zero, and it knows no class."""
    torch.manual_seed(0)
    flow = Flow(config, classes).double().eval()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow


@pytest.fixture(scope="module")
def flow():
    return flow_of(MODEL, ("ant", "bee", "cat"))


@pytest.fixture(scope="module")
def images():
    """Five pictures of noise; their two classes are not the model's."""
    pixels = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    return MemoryImages("five", ("x", "y"), torch.tensor([0, 1, 0, 1, 0]), pixels)


@pytest.mark.parametrize("method", ["gradient", "normalised", "exhaustive", None])
def test_predictions_are_those_of_the_rule_and_of_the_likelihood(flow, images, method):
    clean = images.pixels.double() / 127.5 - 1
    found = predict(flow, images, method, seed=3, batch_size=2)
    scores = classify(flow, clean, method or "exhaustive", seeds=range(3, 8)).softmax(1)
    assert [each.label for each in found] == [flow.classes[k] for k in scores.argmax(1)]
    assert [each.score for each in found] == pytest.approx(
        scores.amax(1).tolist(), rel=1e-6
    )  # the images are read in fp32
    assert [each.image for each in found] == [f"five-{index:06d}" for index in range(5)]
    labelled = dataclasses.replace(images, classes=flow.classes, labels=scores.argmax(1))
    exact = likelihood(flow, labelled, draws=1, seed=3)
    nats = [-each.log_prob / MODEL.dims for each in found]
    assert nats == pytest.approx(exact.nll_values[0].tolist(), rel=1e-9)
    assert [each.bits_per_dim for each in found] == pytest.approx(exact.bits_values[0].tolist(), rel=1e-9)


def test_a_flow_without_classes_or_names(images):
    free = predict(flow_of(dataclasses.replace(MODEL, num_classes=0)), images, limit=2)
    assert [(each.label, each.score) for each in free] == [(None, None)] * 2
    assert all(math.isfinite(each.bits_per_dim) for each in free)
    assert {each.label for each in predict(flow_of(MODEL), images)} <= {"0", "1", "2"}


def test_the_files_hold_every_image(flow, images, tmp_path):
    first, second = (Predictions(predict(flow, images, share=(part, 2))) for part in (0, 1))
    both = first.merge(second)
    assert both.rows == predict(flow, images)
    both.save(tmp_path, {"seed": 0})
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [each.label for each in both.rows]
    assert float(rows[4]["log_prob"]) == both.rows[4].log_prob
    stored = json.loads((tmp_path / "predictions.json").read_text())
    assert stored["settings"] == {"seed": 0}
    assert stored["predictions"][4]["image"] == "five-000004"


def test_pictures_of_any_size_in_any_folder(flow, tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("in/a.png", "in/deep/b.png"):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    folder = open_pictures(flow, tmp_path)
    assert sorted(folder.file_name(index) for index in range(2)) == ["in/a.png", "in/deep/b.png"]
    one = open_pictures(flow, tmp_path / "in/a.png")
    index = [folder.file_name(0), folder.file_name(1)].index("in/a.png")
    assert torch.equal(one.read(torch.tensor([0])), folder.read(torch.tensor([index])))
    assert predict(flow, one)[0].image == "a.png"


def test_what_cannot_be_classified_is_refused(flow, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"a\.png cannot be read .* give a picture"):
        open_pictures(flow, tmp_path / "a.png")
    with pytest.raises(InputError, match=r"nothing"):
        open_pictures(flow, tmp_path / "nothing")
    latent = flow_of(MODEL)
    latent.run = RunConfig(MODEL, codec=CodecConfig(vae="some/vae"))
    with pytest.raises(InputError, match=r"latents of some/vae; prepare the pictures"):
        open_pictures(latent, tmp_path)
