"""`flowback.train`: what it takes from the data, what it stores, says and refuses."""

import dataclasses
import json
import logging
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import flowback
import runs
from flowback import Evaluator, Flow, InputError, checkpoint
from flowback.config import AlignmentConfig
from flowback.data.image_set import MemoryImages, Subset
from flowback.errors import Interrupted
from flowback.files import located
from flowback.folder_lock import folder_lock
from flowback.task_config import EvaluateConfig
from flowback.training import evaluators, train_loop
from flowback.training.run_folder import RunFolder


@pytest.fixture
def open_config(config):
    """The tiny run, which takes the number of classes from its data."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=None))


@pytest.fixture
def pets(digits):
    """The digits 0 and 1 as cats and dogs."""
    chosen = torch.nonzero(digits.labels < 2)[:, 0]
    return MemoryImages("pets", ("cat", "dog"), digits.labels[chosen], digits.pixels[chosen])


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_data_of_the_settings(open_config, tmp_path):
    hook = Evaluator(12, lambda step, flow: {"named": float(flow.classes == tuple("0123456789"))})
    result = flowback.train(open_config, out=str(tmp_path / "run"), evaluators=[hook])
    assert (len(result.images), len(result.test)) == (1437, 360)
    assert result.config.model.num_classes == 10
    assert result.metrics == rows(tmp_path / "run")[-1]
    assert result.metrics["step"] == 12
    assert {"nll", "test_nll", "test_top1_gradient"} <= result.metrics.keys()
    assert result.metrics["named"] == 1
    assert result.folder == tmp_path / "run"
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.folder = tmp_path
    stored = Flow.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in result.flow.state_dict().items())
    assert not result.flow.training


def test_images_of_ones_own(open_config, pets, tmp_path):
    """The names of the classes are in the checkpoint and in the run's own settings."""
    result = flowback.train(open_config, pets, tmp_path / "run")
    assert not any(name.startswith("test_") for name in result.metrics)
    assert result.test is None
    for flow in (result.flow, Flow.from_pretrained(tmp_path / "run")):
        assert flow.classes == ("cat", "dog")
        assert flow.run == result.config
    assert checkpoint.read_config(tmp_path / "run").classes == ("cat", "dog")
    held_out = flowback.train(open_config, pets, tmp_path / "two", test=pets)
    assert held_out.metrics["test_nll"] > 0
    assert held_out.test is pets
    assert result.flow.run.data.name == "none"  # and not scikit-learn's digits, the default
    with pytest.raises(InputError, match="settings name no data: its images were given in Python"):
        flowback.evaluate(result.flow, samples=0)
    with pytest.raises(InputError, match=r"other settings: .*--data\.name \(was none, now digits\)"):
        flowback.train(open_config, out=tmp_path / "run")


def test_paths_are_stored_so_that_they_hold_from_anywhere(open_config, tmp_path, monkeypatch, caplog):
    """A run that was started beside its data is evaluated from another folder; the data are named."""
    caplog.set_level(logging.INFO, "flowback")
    for number in range(12):
        picture = Image.new("L", (8, 8), 20 * number)
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png")
    data = flowback.DataConfig("folder", path="photos", holdout=0.3)
    config = dataclasses.replace(
        open_config, data=data, train=dataclasses.replace(open_config.train, steps=2)
    )
    monkeypatch.chdir(tmp_path)
    flow = flowback.train(config, out="run").flow
    assert flow.run.data.path == tmp_path / "photos"
    monkeypatch.chdir("/")
    report = flowback.evaluate(flow, samples=0, classification=False, draws=1)
    assert report.settings["held_out"]["images"] == "photos-test"
    assert f"The test images are the 3 of {tmp_path}/photos, as the model's settings say" in caplog.text


def test_a_vae_in_a_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    monkeypatch.chdir(tmp_path)
    assert located("vae") == str(tmp_path / "vae")
    assert located("stabilityai/sd-vae-ft-ema") == "stabilityai/sd-vae-ft-ema"  # a name on the hub


@pytest.mark.parametrize("name", ["mine.txt", "deep/er/mine.png", "metrics.jsonl", "model.safetensors"])
def test_a_folder_with_something_else_is_refused_before_the_work(
    open_config, pets, tmp_path, name, monkeypatch
):
    monkeypatch.setattr("flowback.training.run.train_loop", None)
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(InputError, match=rf"--out .* holds (something else \(.*{name}\)|a checkpoint)"):
        flowback.train(open_config, pets, tmp_path / "run")
    assert [each for each in (tmp_path / "run").rglob("*") if each.is_file()] == [file]


def test_a_log_may_lie_in_the_folder_of_a_new_run(open_config, pets, tmp_path):
    """`flowback train ... > runs/mine/train.log` makes it before the run begins."""
    (tmp_path / "run").mkdir()
    for name in ("train.log", "slurm-7.out", ".hidden"):
        (tmp_path / "run" / name).touch()
    RunFolder(tmp_path / "run", open_config).check()


def test_only_one_process_trains_in_a_folder(open_config, pets, tmp_path):
    with folder_lock(tmp_path / "run"), pytest.raises(InputError, match="is in use by process"):
        flowback.train(open_config, pets, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_function_and_the_package_have_names_of_their_own():
    import flowback.training

    assert callable(flowback.train)
    assert flowback.training.train is flowback.train


def test_an_unconditional_model_has_no_class_names(config, pets, tmp_path):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0))
    assert flowback.train(config, pets, tmp_path / "run").flow.classes == ()


@pytest.mark.parametrize("when", ["before the first checkpoint", "later"])
@pytest.mark.parametrize("classes", [("dog", "cat"), ("cat", "eel")])
def test_a_run_does_not_go_on_with_other_classes(open_config, pets, tmp_path, classes, when):
    stop = Evaluator(2 if when.startswith("before") else 6, runs.interrupt)
    with pytest.raises(KeyboardInterrupt):
        flowback.train(open_config, pets, tmp_path / "run", evaluators=[stop])
    other = dataclasses.replace(pets, classes=classes)
    names = ", ".join(classes)
    with pytest.raises(InputError, match=rf"trained on the classes cat, dog; .* the classes {names}\. Give"):
        flowback.train(open_config, other, tmp_path / "run")
    flowback.train(open_config, pets, tmp_path / "run")


def test_settings_that_name_other_classes(open_config, pets, tmp_path):
    config = dataclasses.replace(open_config, classes=("dog", "cat"))
    with pytest.raises(InputError, match=r"The settings name the classes dog, cat, .* pets are cat, dog"):
        flowback.train(config, pets, tmp_path / "run")
    other = dataclasses.replace(pets, classes=("cat", "eel"))
    with pytest.raises(InputError, match="classes that the model does not know: eel"):
        flowback.train(open_config, pets, tmp_path / "run", test=other)
    assert not (tmp_path / "run").exists()


def test_held_out_images_are_matched_by_the_names_of_their_classes(open_config, pets, tmp_path):
    other = dataclasses.replace(pets, classes=("dog", "cat"), labels=1 - pets.labels)
    figures = [
        flowback.train(open_config, pets, tmp_path / name, test=test).metrics["test_nll"]
        for name, test in (("same", pets), ("other", other))
    ]
    assert figures[0] == figures[1]


def test_images_that_do_not_fit_the_model(open_config, pets, tmp_path):
    larger = dataclasses.replace(pets, pixels=pets.pixels.repeat(1, 3, 2, 2))
    with pytest.raises(
        InputError, match=r"pets has images of shape \(3, 16, 16\), but the model takes \(1, 8, 8\)"
    ):
        flowback.train(open_config, larger, tmp_path / "run")
    with pytest.raises(InputError, match="pets has no images"):
        flowback.train(open_config, Subset(pets, torch.tensor([], dtype=torch.int64)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_set_is_said(open_config, pets, tmp_path, caplog):
    one = dataclasses.replace(
        open_config, train=dataclasses.replace(open_config.train, batch_size=8, steps=1)
    )
    flowback.train(one, Subset(pets, torch.arange(8)), tmp_path / "as-large")
    assert "larger than the set" not in caplog.text
    flowback.train(one, Subset(pets, torch.arange(7)), tmp_path / "larger")
    assert "--train.batch-size 8 is larger than the set: a step sees each of its 7 images" in caplog.text


def test_resuming_builds_one_flow(config, digits, tmp_path, monkeypatch):
    """However many averages there are, and none to read their shapes."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ema_more=(0.5, 0.99)))
    with pytest.raises(KeyboardInterrupt):
        train_loop(config, digits, tmp_path, evaluators=[Evaluator(6, runs.interrupt)])
    built, init = [], Flow.__init__

    def count(self, *arguments):
        built.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Flow, "__init__", count)
    train_loop(config, digits, tmp_path)
    assert len(built) == 1


def test_a_state_of_another_shape_is_named(config, digits, targets, tmp_path):
    """As features of another width give it."""
    config = dataclasses.replace(
        config, alignment=AlignmentConfig(strategy="detach", locations=((2, 1),), hidden=8)
    )
    train_loop(config, digits, tmp_path, targets)
    narrow = runs.RandomTargets()
    narrow.dim = 5
    with pytest.raises(
        InputError,
        match=r"checkpoint .*step-00000012 does not fit this run: The training state has another "
        r"projector\.layers\.4\.weight: \(6, 8\) in the checkpoint, \(5, 8\) in the model",
    ):
        train_loop(config, digits, tmp_path, narrow)


@pytest.mark.parametrize("what", ["missing", "shape", "optimiser", "more"])
def test_a_checkpoint_of_another_model(config, digits, tmp_path, what):
    train_loop(config, digits, tmp_path)
    folder = checkpoint.resolve(tmp_path)
    state = checkpoint.load_training_state(folder)
    settings, weights = checkpoint.load_weights(folder)
    name, short = "blocks.0.proj_in.weight", "The average of decay 0.9 has another blocks.0.proj_in.weight"
    if what == "missing":
        del weights[name]
        sentence = rf"{short}: missing in the checkpoint, \(16, 16\)"
    elif what == "shape":
        weights[name] = weights[name][:1].clone()  # which would be broadcast
        sentence = rf"{short}: \(1, 16\) in the checkpoint"
    elif what == "more":
        weights["blocks.2.more"] = torch.zeros(1)
        sentence = r"another blocks\.2\.more: \(1,\) in the checkpoint, missing in the model"
    else:
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
        sentence = r"The optimiser's exp_avg has another flow\.\S+: \(3,\) in the checkpoint"
    checkpoint.save(folder, settings, weights, state)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=16))
    with pytest.raises(InputError, match=sentence):
        train_loop(longer, digits, tmp_path)


def test_what_the_run_says(open_config, tmp_path, caplog):
    """Off a terminal, as here, lines take the place of the bar."""
    config = dataclasses.replace(open_config, train=dataclasses.replace(open_config.train, micro_batch=6))
    with caplog.at_level("INFO", "flowback"):
        flowback.train(config, out=tmp_path / "run")
    about, parameters, batch, run, *steps = caplog.messages
    assert about == (
        "Images: 1,437 of digits-train, 8x8x1, 10 classes "
        "(0 = 0, 1 = 1, 2 = 2, 3 = 3, 4 = 4, 5 = 5, 6 = 6, 7 = 7, ...)."
    )
    count = sum(p.numel() for p in Flow(dataclasses.replace(config.model, num_classes=10)).parameters())
    assert parameters == f"Parameters: {count:,} in the flow; device cpu."
    assert batch == "Batch: 16 images in 1 process, 16 in each, in 3 accumulation steps of 6."
    assert run == f"Run: {tmp_path / 'run'}, from step 0 to 12."
    found = [re.fullmatch(r"Step (\d+) of 12: nll (\S+), \S+ images/s, \d:\d\d:\d\d left", s) for s in steps]
    assert [(int(m[1]), float(m[2])) for m in found] == [
        (row["step"], pytest.approx(row["nll"], abs=1e-4)) for row in rows(tmp_path / "run")
    ]
    caplog.clear()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=13))
    with caplog.at_level("INFO", "flowback"):
        flowback.train(longer, out=tmp_path / "run")
    assert f"Run: {tmp_path / 'run'}, from step 12 to 13." in caplog.messages
    assert checkpoint.read_config(tmp_path / "run").train.steps == 13
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    with caplog.at_level("INFO", "flowback"):
        assert flowback.train(shorter, out=tmp_path / "run").metrics["step"] == 13
    assert f"{tmp_path / 'run'} has 13 steps already, and --train.steps is 3: nothing is trained." in (
        caplog.messages
    )


def test_on_a_terminal_the_bar_says_it(config, digits, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("flowback.training.loop.on_terminal", lambda: True)
    with caplog.at_level("INFO", "flowback"):
        train_loop(config, digits, tmp_path)
    assert caplog.messages[-1].startswith("Run: ")


def hit(number, steps):
    """An evaluator that sends this process a signal, at each of ``steps``."""
    return Evaluator(1, lambda step, flow: os.kill(os.getpid(), number) or {} if step in steps else {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once(config, digits, tmp_path, caplog, number):
    caplog.set_level("WARNING", "flowback")  # which the command line sets to INFO in other tests
    said = []
    after = Evaluator(1, lambda step, flow: said.append(list(caplog.messages)) or {})
    with pytest.raises(Interrupted):
        train_loop(config, digits, tmp_path, evaluators=[hit(number, [5]), after])
    assert said[3] == []
    assert said[4] == [
        f"{number.name}: the run stops after this step and saves. Press Ctrl-C again to stop now."
    ]
    assert len(said) == 5
    assert checkpoint.resolve(tmp_path).name == "step-00000005"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_stops_now(config, digits, tmp_path, first):
    before = signal.getsignal(signal.SIGINT)  # a shell in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        train_loop(config, digits, tmp_path, evaluators=[hit(first, [5]), hit(signal.SIGINT, [5])])
    assert checkpoint.resolve(tmp_path).name == "step-00000004"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_sigterm_changes_nothing(config, digits, tmp_path):
    """Schedulers send more than one."""
    twice = [hit(signal.SIGTERM, [5]), hit(signal.SIGTERM, [5])]
    with pytest.raises(Interrupted):
        train_loop(config, digits, tmp_path, evaluators=twice)
    assert checkpoint.resolve(tmp_path).name == "step-00000005"


def test_what_is_measured_along_a_run(open_config, pets, tmp_path, monkeypatch):
    """The distance is that of `evaluate` without guidance, to the training images, at its own steps."""
    asked = []

    def evaluate(flow, images, *, reference, config):  # the whole reference, however few samples there are
        asked.append((flow.training, images is pets, reference is pets, config))
        return SimpleNamespace(figures={"fd_efficientnet_lite0": 7.0, "other": 1.0})

    monkeypatch.setattr(evaluators, "evaluate", evaluate)
    train = dataclasses.replace(
        open_config.train, eval_exhaustive=True, frechet_every=open_config.train.steps, frechet_samples=4
    )
    config = dataclasses.replace(open_config, train=train)
    result = flowback.train(config, pets, tmp_path / "run", test=pets)
    assert result.metrics["fd_efficientnet_lite0"] == 7.0
    assert "other" not in result.metrics
    config = EvaluateConfig(samples=4, reference_limit=None, likelihood=False, classification=False)
    assert asked == [(False, True, True, config)]
    exact = flowback.accuracy(result.flow, pets, "exhaustive")
    assert result.metrics["test_top1_exhaustive"] == pytest.approx(exact.top1)
