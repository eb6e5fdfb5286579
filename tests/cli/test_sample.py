"""``flowback sample`` and ``flowback plan`` on a small checkpoint."""

import json
import time

import numpy as np
import pytest
import torch

import runs
from flowback import Denoising, sample
from flowback.checkpoint import save
from flowback.config import RunConfig
from flowback.data.pixels import to_bytes
from flowback.sampling.image_files import read_png
from sampling.flows import tame_flow
from sampling.test_sampler import breaking

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    flow = tame_flow(torch.float32)
    folder = tmp_path_factory.mktemp("sample") / "checkpoint"
    save(folder, RunConfig(model=flow.config), flow.state_dict())
    return folder, flow


def test_writes_images_grid_npz_trajectory(flowback, checkpoint, tmp_path):
    folder, flow = checkpoint
    code, out, err = flowback(
        *("sample", folder, "--out", tmp_path / "s", "--count", 5, "--labels", 1, 3, "--seed", 7),
        *("--guidance", 1.5, "--grid", tmp_path / "g.png", "--npz", tmp_path / "s.npz"),
        *("--trajectory", tmp_path / "t.png", "--json", tmp_path / "s.json"),
    )
    assert code == 0, err
    expected = to_bytes(sample(flow, [1, 3, 1, 3, 1], range(7, 12), 1.5))
    for index in range(5):
        pixels, notes = read_png(tmp_path / "s" / f"{index:06d}.png")
        assert (pixels.int() - expected[index].int()).abs().max() <= 1
        assert notes == {"seed": str(7 + index), "label": str([1, 3][index % 2])}
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["arr_1"].tolist() == [1, 3, 1, 3, 1]
    assert read_png(tmp_path / "g.png")[0].shape[1] == 2 + 2 * 66
    assert read_png(tmp_path / "t.png")[0].shape[1:] == (2 + 5 * 66, 2 + 4 * 66)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["result"]["drawn"] == 5
    assert record["settings"]["guidance"] == 1.5
    assert "images/s" in out


def test_without_out_other_options_go_elsewhere(flowback, checkpoint, tmp_path, monkeypatch):
    """Nobody who tries options has to name folders; the same options find their images again."""
    monkeypatch.chdir(tmp_path)
    words = ("sample", checkpoint[0], "--count", 2, *CPU)
    assert flowback(*words)[0] == 0
    code, out, _ = flowback(*words, "--guidance", 1)
    assert code == 0
    assert "samples/checkpoint-2.png" in out
    for more, name in (((), "checkpoint"), (("--guidance", 1), "checkpoint-2")):
        code, out, _ = flowback(*words, *more)
        assert code == 0
        assert "2 images were there already." in out
        assert f"All in one picture: samples/{name}.png" in out
    names = ["checkpoint", "checkpoint-2", "checkpoint-2.png", "checkpoint.png"]
    assert sorted(place.name for place in (tmp_path / "samples").iterdir()) == names


def test_plan_then_auto(flowback, checkpoint, tmp_path):
    folder, _ = checkpoint
    code, out, _ = flowback("sample", folder, "--out", tmp_path / "a", "--count", 4, "--sampler", "auto")
    assert code == 0
    assert "Sequential" in out
    code, out, err = flowback(
        "plan", folder, "--batch-size", 4, "--device", "cpu", "--json", tmp_path / "p.json"
    )
    assert code == 0, err
    assert len(json.loads((tmp_path / "p.json").read_text())["plan"]["blocks"]) == 2
    auto = ("--sampler", "auto", "--device", "cpu")
    code, out, _ = flowback("sample", folder, "--out", tmp_path / "b", "--count", 4, "--batch-size", 4, *auto)
    assert code == 0
    assert "Planned" in out
    code, out, _ = flowback("sample", folder, "--out", tmp_path / "c", "--count", 4, "--batch-size", 2, *auto)
    assert "batch size 4, not 2" in out
    for name in ("b", "c"):  # the planned images are the sequential ones to 1e-3: one level of 255
        for index in range(4):
            a, b = (read_png(tmp_path / s / f"{index:06d}.png")[0].int() for s in ("a", name))
            assert (a - b).abs().max() <= 1


@pytest.fixture(scope="module")
def ranged(tmp_path_factory):
    """A checkpoint of a flow with a range of noise levels."""
    flow = tame_flow(torch.float32, noise="range", noise_min=0.05, noise_max=0.5)
    folder = tmp_path_factory.mktemp("ranged") / "checkpoint"
    save(folder, RunConfig(model=flow.config), flow.state_dict())
    return folder, flow


def test_denoising_in_steps(flowback, ranged, tmp_path):
    folder, flow = ranged
    words = ("sample", folder, "--out", tmp_path / "s", "--count", 3, *CPU, "--json", tmp_path / "s.json")
    steps = ("--denoise-steps", 3, "--denoise-method", "heun", "--denoise-spacing", "log", "--noise", 0.4)
    more = ("--denoise-last", 0.1, "--denoise-guidance", 0.5, "--denoise-clamp")
    code, _, err = flowback(*words, *steps, *more)
    assert code == 0, err
    denoising = Denoising(3, "heun", "log", 0.1, True, 0.5)
    expected = to_bytes(sample(flow, [0, 1, 2], range(3), denoise=denoising, noise=0.4))
    for index in range(3):
        pixels, _ = read_png(tmp_path / "s" / f"{index:06d}.png")
        assert (pixels.int() - expected[index].int()).abs().max() <= 1
    settings = json.loads((tmp_path / "s.json").read_text())["settings"]
    assert settings["denoising"]["method"] == "heun"
    assert settings["denoising"]["levels"] == pytest.approx([0.4, 0.2, 0.1])
    code, _, err = flowback(*words, "--denoise-steps", 3)
    assert code == 2
    assert "holds images drawn with denoising" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--denoise-steps", 0), "--denoise-steps is 0; it must be at least 1."),
        (("--denoise-last", 0.01), "The noise level 0.01 is outside the range"),
        (("--noise", 0.1, "--denoise-last", 0.3), "do not decrease"),
        (("--denoise-guidance", 1, "--unconditional"), "--denoise-guidance without labels does nothing"),
        (("--no-denoise", "--denoise-steps", 3), "--no-denoise leaves out"),
    ],
)
def test_bad_denoising(flowback, ranged, tmp_path, words, message):
    code, _, err = flowback("sample", ranged[0], "--out", tmp_path / "s", "--count", 2, *CPU, *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "s").exists()


def test_a_flow_of_one_level_is_not_denoised_in_steps(flowback, checkpoint, tmp_path):
    words = ("sample", checkpoint[0], "--out", tmp_path / "s", *CPU)
    code, out, err = flowback(*words, "--denoise-steps", 5)
    sentence = (
        "This flow knows one noise level, 0.05, and cannot be denoised in steps: train one with "
        "--model.noise range, or leave --denoise-steps and --denoise-last out."
    )
    assert (code, err) == (2, f"flowback: {sentence}\n")
    assert out.count("\n") == 1  # what the flow is
    assert not (tmp_path / "s").exists()
    assert flowback(*words, "--count", 1, "--denoise-steps", 1)[0] == 0
    stored = json.loads((tmp_path / "s" / "sampling.json").read_text())
    assert stored["denoising"] is None  # the same images as without the option


def test_models_of_uniform_noise_say_that_nothing_is_denoised(flowback, tmp_path):
    flow = tame_flow(torch.float32, noise="uniform", num_classes=0)
    save(tmp_path / "c", RunConfig(model=flow.config), flow.state_dict())
    code, out, _ = flowback("sample", tmp_path / "c", "--out", tmp_path / "s", "--count", 2)
    assert code == 0
    assert "Not denoised" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tolerance", 0), "--tolerance"),
        (("--count", 0), "--count"),
        (("--labels", 0, 1, 2, "--count", 2), "3 labels for 2 images"),
        (("--labels", 9), "out of range"),
        (("--labels", 1, "--unconditional"), "exclude"),
        (("--unconditional", "--guidance", 1), "attention temperature"),
        (("--guided-blocks", 5, "--guidance", 1), "guided blocks"),
        (("--labels", "cat"), "does not know the names of its classes"),
        (("--grid", "."), "--grid . is a folder"),
        (
            ("--grid", "/dev/null/g.png"),
            "--grid /dev/null/g.png cannot be written: /dev/null is not a",
        ),
        (("--npz", "/dev/null/new/s.npz"), "--npz /dev/null/new/s.npz cannot be written"),
        (("--trajectory", "/dev/null/t.png"), "--trajectory /dev/null/t.png cannot be written"),
        (("--json", "/dev/null/s.json"), "--json /dev/null/s.json cannot be written"),
        (("--seed", -1), "--seed"),
        (("--guidance", "nan"), "Option guidance is NaN, which is not a finite number."),
        (("--attention-temperature", "nan"), "Option attention_temperature is NaN"),
        (("--attention-temperature", 0), "--attention-temperature must be above 0"),
        (("--vae", "x"), "--vae x: the model works on pixels"),
    ],
)
def test_bad_options(flowback, checkpoint, tmp_path, words, message):
    code, _, err = flowback("sample", checkpoint[0], "--out", tmp_path / "s", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_other_images_in_the_folder(flowback, checkpoint, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"")
    code, _, err = flowback("sample", checkpoint[0], "--out", tmp_path)
    assert code == 2
    assert "holds something else" in err


def test_two_processes_killed_and_finished(flowback, checkpoint, tmp_path):
    """Both processes are killed half-way; two more finish, to the bytes of one undisturbed process."""

    def words(name, count):
        options = ["--out", tmp_path / name, "--count", count, "--batch-size", 2, *CPU]
        return ["sample", str(checkpoint[0]), *map(str, options)]

    log, deadline = tmp_path / "log", time.monotonic() + 120
    started = runs.start(runs.command, *words("cut", 5000), log=log, processes=2)
    while len(list((tmp_path / "cut").glob("*.png"))) < 4 and time.monotonic() < deadline:
        assert all(process.is_alive() for process in started), runs.printed(log)
        time.sleep(0.02)
    for process in started:
        process.kill()
        process.join()
    there = len(list((tmp_path / "cut").glob("*.png")))
    assert 4 <= there < 5000
    codes = runs.run(runs.command, *words("cut", there + 3), log=log, processes=2)
    assert codes == [0, 0], runs.printed(log)
    assert flowback(*words("whole", there + 3))[0] == 0
    found, whole = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.png")}
        for name in ("cut", "whole")
    )
    assert len(whole) == there + 3
    assert {name: found[name] for name in whole} == whole


def test_the_grid_has_a_row_for_each_class(flowback, checkpoint, tmp_path):
    """Five images of three classes: the third row is half empty, and no class slips into another's row."""
    words = ("sample", checkpoint[0], "--out", tmp_path / "s", "--count", 5, "--labels", 0, 1, 2, *CPU)
    assert flowback(*words, "--grid", tmp_path / "g.png")[0] == 0
    whole = read_png(tmp_path / "g.png")[0]
    files = sorted((tmp_path / "s").glob("*.png"))
    images = [read_png(file)[0] for file in files]
    whole = whole[:, :, whole.shape[2] - (2 + 2 * 66) :]  # without the names of the rows
    cell = (whole.shape[1] - 2) // 3 - 2, (whole.shape[2] - 2) // 2 - 2  # gaps of 2 pixels
    for number in range(6):
        row, column = number % 3, number // 3
        top, left = 2 + row * (cell[0] + 2), 2 + column * (cell[1] + 2)
        shown = whole[:, top : top + cell[0], left : left + cell[1]]
        scale = cell[0] // images[0].shape[1]
        expected = images[number] if number < 5 else torch.zeros_like(images[0])
        assert torch.equal(shown[:, ::scale, ::scale], expected), number


def test_labels_by_name(flowback, tmp_path):
    flow = tame_flow(torch.float32)
    config = RunConfig(model=flow.config, classes=("cat", "dog", "eel", "1", "fox"))
    save(tmp_path / "c", config, flow.state_dict())
    words = ("sample", tmp_path / "c", "--out", tmp_path / "s", "--count", 4, *CPU)
    code, _, err = flowback(*words, "--labels", "dog", "cat", "1", "2")  # 1 is a name, 2 is none
    assert code == 0, err
    notes = [read_png(file)[1]["label"] for file in sorted((tmp_path / "s").glob("*.png"))]
    assert notes == ["1", "0", "3", "2"]
    code, _, err = flowback("sample", tmp_path / "c", "--out", tmp_path / "t", "--labels", "dot")
    assert code == 2
    assert "no class 'dot'; did you mean dog" in err
    assert not (tmp_path / "t").exists()


def test_images_that_fail_are_named_and_the_command_fails(flowback, tmp_path):
    """With the block and the token where they broke: block 2 reads backwards."""
    flow = breaking(2, 5)
    save(tmp_path / "c", RunConfig(model=flow.config), flow.state_dict())
    words = ("sample", tmp_path / "c", "--out", tmp_path / "s", "--count", 4, "--json", tmp_path / "s.json")
    code, out, err = flowback(*words, *CPU, "--redraws", 1, "--grid", tmp_path / "g.png")
    assert code == 2
    assert err.count("\n") == 1
    assert "4 of 4 images are missing" in err
    assert "block 2, token 10" in err
    assert "block 2, token 10" in out
    result = json.loads((tmp_path / "s.json").read_text())["result"]
    assert (result["drawn"], result["redrawn"]) == (0, 0)
    assert result["failed"][3] == {"image": 3, "block": 2, "token": 10, "step": None}
    assert not (tmp_path / "g.png").exists()


def test_a_checkpoint_that_changed_under_its_path_is_noticed(flowback, checkpoint, tmp_path):
    words = ("sample", tmp_path / "c", "--out", tmp_path / "s", "--count", 1, *CPU)
    for seed, expected in ((0, 0), (1, 2)):
        flow = tame_flow(torch.float32, seed=seed)
        save(tmp_path / "c", RunConfig(model=flow.config), flow.state_dict())
        code, _, err = flowback(*words)
        assert code == expected
    assert "weights = " in err
    assert flowback("sample", checkpoint[0], *words[2:])[0] == 0  # the first weights, at another path


def test_planning_refuses_before_it_measures(flowback, checkpoint, tmp_path):
    for words, message in ((("--batch-size", 0), "--batch-size"), (("--guided-blocks", 9), "guided blocks")):
        code, _, err = flowback("plan", checkpoint[0], *CPU, *words)
        assert code == 2
        assert message in err
