from __future__ import annotations

import json

import pytest
import torch

import flowback
from fake_inception import FakeInception
from flowback import EvaluateConfig, Flow, InputError, ModelConfig, RunConfig, SampleConfig, checkpoint
from flowback.cli import main
from flowback.data.image_set import MemoryImages, Subset
from flowback.data.load import load_images
from flowback.evaluation.pipeline import reference_limit
from flowback.evaluation.references import Reference
from flowback.evaluation.report import Report
from flowback.sampling.image_files import save_npz
from flowback.training.run import open_images
from reference import random_flow

RULES = ("gradient", "normalised", "exhaustive")
FIGURES = {"nll", "bits_per_dim", *(f"top{k}_{rule}" for k in (1, 5) for rule in RULES)}


def image_set(count: int = 20, seed: int = 0, classes: str = "abcde") -> MemoryImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % len(classes)
    return MemoryImages(f"set {seed}", tuple(classes), labels, pixels)


def small_flow(**changes) -> Flow:
    return random_flow(torch.float32, **changes)


def values(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if not name.endswith("_error")}


def test_python_and_the_command_line_find_the_same(tmp_path):
    config = RunConfig(
        ModelConfig(
            image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=10
        ),
        classes=tuple("0123456789"),
    )
    torch.manual_seed(0)
    flow = Flow(config.model, config.classes)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(tmp_path / "flow", config, flow.state_dict())
    words = "--samples 20 --search 0:1:1 --limit 30 --draws 2 --seed 3 --batch-size 16"
    words += " --reference-limit 40 --device cpu"
    command = ["evaluate", str(tmp_path / "flow"), *words.split(), "--json", str(tmp_path / "report.json")]
    assert main(command) == 0
    typed = Report.load(tmp_path / "report.json")
    found = flowback.evaluate(
        Flow.from_pretrained(tmp_path / "flow"),
        samples=20,
        search=(0, 1),
        limit=30,
        draws=2,
        seed=3,
        batch_size=16,
        reference_limit=40,
    )
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["figures"] == typed.figures
    assert plain["settings"] == typed.settings
    assert found.warnings == typed.warnings
    assert found.settings["guidance"] == [0, 1]
    assert found.settings["checkpoint"] == str(tmp_path / "flow")


def test_a_flow_and_images_from_python():
    flow, test, train = small_flow(), image_set(20), image_set(30, seed=1)
    report = flowback.evaluate(flow, test, reference=train, samples=10, draws=1, guidance=0.5)
    assert set(values(report.figures)) == FIGURES | {"fd_efficientnet_lite0"}
    settings = report.settings
    assert settings["checkpoint"] is None
    assert settings["data"] is None
    assert settings["held_out"]["images_hash"] == test.fingerprint
    assert settings["reference_hash"] == train.fingerprint
    assert (settings["samples"], settings["guidance"], settings["sampler"]) == (10, 0.5, "sequential")
    again = flowback.evaluate(
        flow,
        test,
        reference=Reference.of(train),
        config=EvaluateConfig(samples=10, draws=1),
        sampling=SampleConfig(guidance=0.5),
    )
    assert again.figures == report.figures
    assert again.settings == report.settings


def test_what_is_not_asked_for_is_not_needed():
    report = flowback.evaluate(small_flow(), image_set(), samples=0, classification=False)
    assert set(values(report.figures)) == {"nll", "bits_per_dim"}
    without = flowback.evaluate(
        small_flow(), reference=image_set(), samples=6, likelihood=False, classification=False
    )
    assert set(without.figures) == {"fd_efficientnet_lite0"}


def test_a_flow_from_no_run_needs_its_images():
    with pytest.raises(InputError, match="give its test images"):
        flowback.evaluate(small_flow(), samples=0)
    with pytest.raises(InputError, match="give its train images"):
        flowback.evaluate(small_flow(), image_set(), samples=4)


def test_options_that_do_not_exist_or_do_not_fit():
    flow, images = small_flow(), image_set()
    with pytest.raises(InputError, match="no option smaples; did you mean samples"):
        flowback.evaluate(flow, images, smaples=3)
    with pytest.raises(InputError, match="no option guidance"):
        flowback.evaluate_images(images, images, guidance=3)
    with pytest.raises(InputError, match="at least 2"):
        flowback.evaluate(flow, images, samples=1)
    with pytest.raises(InputError, match="Guidance without labels"):
        flowback.evaluate(small_flow(num_classes=0), images, reference=images, samples=4, search=(0, 1))


def test_a_search_gives_each_scale_the_figures_it_has_alone():
    flow, train = small_flow(), image_set(30, seed=1)
    options = {"reference": train, "samples": 8, "likelihood": False, "classification": False}
    search = flowback.evaluate(flow, search=(0, 1), guidance=7, **options)
    alone = [flowback.evaluate(flow, guidance=scale, **options).figures for scale in (0, 1)]
    name = "fd_efficientnet_lite0"
    assert [row[name] for row in search.figures["guidance"]] == [own[name] for own in alone]
    best = min((0, 1), key=lambda scale: alone[scale][name])
    assert (search.figures["best_guidance"], search.figures[name]) == (best, alone[best][name])
    assert "The best guidance lies at the edge of the search: widen the range." in search.warnings


def test_references_of_every_kind_and_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("flowback.evaluation.pipeline.load_inception", lambda *_: FakeInception())
    pixels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    images = MemoryImages("colours", (), None, pixels)
    save_npz(pixels, tmp_path / "reference.npz")
    flow = small_flow(channels=3, num_classes=0)
    options = {"samples": 12, "likelihood": False, "classification": False, "protocol": "adm"}
    given = flowback.evaluate(flow, reference=images, **options)
    read = flowback.evaluate(flow, reference=str(tmp_path / "reference.npz"), **options)
    assert given.figures == read.figures
    assert {"fid", "precision"} <= set(given.figures)
    few = flowback.evaluate(flow, reference=images, reference_limit=5, **options)
    assert few.settings["reference_images"] == 5
    assert few.figures["fid"] != given.figures["fid"]


def test_images_that_exist_already():
    digits = Subset(load_images(flowback.DataConfig(), 8, 1, "train"), torch.arange(10))
    same = flowback.evaluate_images(image_set(10, seed=4), image_set(10, seed=4))
    other = flowback.evaluate_images(image_set(10, seed=4), digits)
    assert abs(same.figures["fd_efficientnet_lite0"]) < 1e-3
    assert other.figures["fd_efficientnet_lite0"] > 1
    assert same.settings["samples"] == 10


def test_classes_are_matched_by_name():
    """A model of cats and dogs: another order is relabelled, a class that it does not know is refused."""
    torch.manual_seed(0)
    flow = Flow(small_flow(num_classes=2).config, ("cat", "dog")).eval()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = image_set(12, classes="xy")
    right = MemoryImages("right", ("cat", "dog"), images.labels, images.pixels)
    turned = MemoryImages("turned", ("dog", "cat"), 1 - images.labels, images.pixels)
    found = [flowback.evaluate(flow, side, samples=0, draws=1).figures for side in (right, turned)]
    assert found[0] == found[1]
    assert torch.equal(*(flowback.accuracy(flow, side).confusion for side in (right, turned)))
    wrong = MemoryImages("wrong", ("dog", "eel"), images.labels, images.pixels)
    for measure in (
        lambda: flowback.evaluate(flow, wrong, samples=0),
        lambda: flowback.accuracy(flow, wrong),
        lambda: flowback.probe(flow, wrong, wrong),
    ):
        with pytest.raises(InputError, match="eel"):
            measure()


def test_the_reference_fits_the_samples_and_the_record_says_so(monkeypatch):
    """By default, 10 images for each sample, at least so many; a limit is another reference in the cache."""
    monkeypatch.setattr("flowback.evaluation.pipeline._FEWEST", 12)
    options = {"likelihood": False, "classification": False, "samples": 2}
    train = image_set(60, seed=1)
    fitted = flowback.evaluate(small_flow(), reference=train, **options)
    assert (fitted.settings["reference_limit"], fitted.settings["reference_images"]) == (20, 20)
    whole = flowback.evaluate(small_flow(), reference=train, reference_limit=None, **options)
    assert (whole.settings["reference_limit"], whole.settings["reference_images"]) == (None, 60)
    assert fitted.settings["reference_hash"] != whole.settings["reference_hash"]
    assert fitted.figures != whole.figures
    assert (
        flowback.evaluate(small_flow(), reference=train, reference_limit=20, **options).figures
        == fitted.figures
    )


def test_published_protocols_take_the_whole_reference():
    assert reference_limit(EvaluateConfig(protocol="adm"), 2) is None
    assert reference_limit(EvaluateConfig(protocol="tarflow"), 2) is None
    assert reference_limit(EvaluateConfig(protocol="adm", reference_limit=7), 2) == 7


def test_a_reference_is_announced_once(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path))
    options = {"reference": image_set(60, seed=1), "likelihood": False, "classification": False, "samples": 4}
    with caplog.at_level("INFO", "flowback"):
        flowback.evaluate(small_flow(), reference_limit=20, **options)
        flowback.evaluate(small_flow(), reference_limit=20, **options)
    said = [line for line in caplog.messages if line.startswith("Statistics of the reference")]
    assert said == [
        "Statistics of the reference, 20 images of set 1, in efficientnet_lite0: made once, then kept. "
        "--reference-limit N takes fewer."
    ]


def test_tensors_and_datasets_serve_wherever_a_set_does():
    images = image_set(20)
    tensors = images.pixels, images.labels
    dataset = torch.utils.data.TensorDataset(*tensors)
    flow, options = small_flow(), {"samples": 2, "draws": 1, "reference": images.pixels}
    expected = flowback.evaluate(flow, images, samples=2, draws=1, reference=images).figures
    assert flowback.evaluate(flow, dataset, **options).figures == expected
    assert flowback.accuracy(flow, dataset).top1 == flowback.accuracy(flow, images).top1
    assert flowback.predict(flow, images.pixels)[3].label == flowback.predict(flow, images)[3].label
    ours = flowback.evaluate_images(images.pixels, images.pixels).figures
    assert ours == flowback.evaluate_images(images, images).figures


def test_a_dataset_is_trained_on():
    images = image_set(20)
    config = RunConfig(ModelConfig(image_size=8, channels=1, patch_size=4, width=16, head_dim=8))
    dataset = torch.utils.data.TensorDataset(images.pixels, images.labels)
    completed, opened, test = open_images(config, dataset, images.pixels)
    assert completed.model.num_classes == 5
    assert torch.equal(opened.read(torch.arange(20)), images.pixels)
    assert len(test) == 20
