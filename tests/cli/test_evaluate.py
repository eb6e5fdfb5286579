from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from fake_inception import FakeInception
from flowback import DataConfig, Flow, ModelConfig, RunConfig, checkpoint
from flowback.sampling.image_files import save_npz
from sampling.flows import tame_flow


@pytest.fixture(scope="module")
def model(tmp_path_factory, photos):
    """A checkpoint of an untrained flow for the photographs, at 16 × 16."""
    config = RunConfig(
        ModelConfig(image_size=16, patch_size=8, width=16, blocks=2, layers=1, head_dim=8, num_classes=2),
        DataConfig("folder", photos),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save(folder, config, Flow(config.model).state_dict())
    return folder


def read(path):
    return json.loads(path.read_text())


def test_everything_that_needs_no_download(flowback, model, tmp_path):
    out = tmp_path / "out.json"
    code, text, _ = flowback(
        "evaluate", model, "--samples", 6, "--json", out, "--out", tmp_path, "--draws", 2
    )
    assert code == 0
    record = read(out)
    assert record == read(tmp_path / "evaluate.json")
    figures, settings = record["figures"], record["settings"]
    names = {"nll", "nll_error", "bits_per_dim", "bits_per_dim_error", "top1_gradient", "top1_exhaustive"}
    assert names | {"fd_efficientnet_lite0"} <= set(figures)
    wanted = {
        "weights_sha256", "data", "samples", "guidance", "sampler", "tolerance", "denoise", "seed",
        "protocol", "reference_hash", "resize", "rounding", "encoder_hash",
    }  # fmt: skip
    assert wanted <= set(settings)
    assert settings["denoise_levels"] == [0.05]
    assert "commit" in record["environment"]
    assert not any("FID" in warning for warning in record["warnings"])
    assert "fd_efficientnet_lite0" in text


def test_denoising_that_does_not_fit_is_said_before_the_work(flowback, model, photos, tmp_path):
    size = {"image_size": 16, "channels": 3, "patch_size": 8, "num_classes": 0}
    flow = tame_flow(torch.float32, **size, noise="range", noise_min=0.05, noise_max=0.5)
    checkpoint.save(tmp_path / "c", RunConfig(flow.config, DataConfig("folder", photos)), flow.state_dict())
    for subject, words, message in (
        (tmp_path / "c", ("--denoise-guidance", 1), "--denoise-guidance without labels"),
        (tmp_path / "c", ("--denoise-last", 0.01), "0.01 is outside the range"),
        (model, ("--denoise-steps", 5), "cannot be denoised in steps"),
    ):
        code, out, err = flowback("evaluate", subject, "--out", tmp_path / "out", "--device", "cpu", *words)
        assert (code, out) == (2, "")
        assert message in err


def test_two_processes_find_what_one_finds(flowback, launched, model, tmp_path):
    words = ["evaluate", model, "--samples", 5, "--limit", 7, "--draws", 2, "--device", "cpu"]
    words = [*words, "--sampler", "jacobi", "--window", 2, "--tolerance", 1e-6]
    assert flowback(*words, "--out", tmp_path / "one")[0] == 0
    run = subprocess.run(
        **launched(*words, "--out", tmp_path / "two"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Report:") == 1
    one, two = (read(tmp_path / name / "evaluate.json") for name in ("one", "two"))
    assert one["settings"] == two["settings"]
    assert one["settings"]["tolerance"] == 1e-6
    assert one["settings"]["sampler"][0]["window"] == 2
    # fp32 features of other batch sizes; the covariance of 5 images magnifies their rounding
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-3)


def test_a_plan_that_is_not_there_is_said(flowback, model, tmp_path):
    arguments = ("--samples", 4, "--no-likelihood", "--no-classification", "--out", tmp_path)
    code, text, _ = flowback("evaluate", model, *arguments, "--sampler", "auto")
    assert code == 0
    assert "has no plan" in text
    assert read(tmp_path / "evaluate.json")["settings"]["sampler"] == "sequential"


def test_guidance_search_shares_the_noise_and_names_the_best(flowback, model, tmp_path):
    arguments = ("--samples", 4, "--no-likelihood", "--no-classification", "--out", tmp_path)
    code, text, _ = flowback("evaluate", model, *arguments, "--search", "0:2:1")
    assert code == 0
    figures = read(tmp_path / "evaluate.json")["figures"]
    assert [row["guidance"] for row in figures["guidance"]] == [0, 1, 2]
    best = min(figures["guidance"], key=lambda row: row["fd_efficientnet_lite0"])
    assert figures["best_guidance"] == best["guidance"]
    assert f"Best guidance by fd_efficientnet_lite0: {best['guidance']:g}" in text
    with Image.open(tmp_path / "guidance.png") as picture:
        assert picture.width > 300
    flowback("evaluate", model, *arguments, "--guidance", "1")  # alone: the same samples as in the search
    alone = read(tmp_path / "evaluate.json")["figures"]["fd_efficientnet_lite0"]
    assert alone == pytest.approx(figures["guidance"][1]["fd_efficientnet_lite0"], rel=1e-6)


def test_inception_figures_come_with_a_warning(flowback, model, tmp_path, monkeypatch):
    monkeypatch.setattr("flowback.evaluation.pipeline.load_inception", lambda *_: FakeInception())
    arguments = ("--samples", 12, "--no-likelihood", "--no-classification", "--out", tmp_path)
    code, text, _ = flowback("evaluate", model, *arguments, "--protocol", "adm")
    assert code == 0
    record = read(tmp_path / "evaluate.json")
    assert {"fid", "sfid", "inception_score", "precision", "recall"} <= set(record["figures"])
    assert any("FID from 12 samples" in warning for warning in record["warnings"])
    assert "from 12 samples only" in text
    assert record["settings"]["inception_hash"] == "fake"
    code, _, _ = flowback("evaluate", model, *arguments, "--protocol", "tarflow")
    assert code == 0
    record = read(tmp_path / "evaluate.json")
    assert "fid_tarflow" in record["figures"]
    assert "fid" not in record["figures"]
    assert record["settings"]["rounding"] == "truncate"


def test_samples_that_are_not_finite_are_counted_and_named(flowback, model, tmp_path, monkeypatch):
    def broken(_sampler, labels, seeds):
        images = torch.zeros(len(seeds), 3, 16, 16)
        images[torch.tensor([seed == 11 for seed in seeds])] = torch.nan
        return images

    monkeypatch.setattr("flowback.sampling.Sampler.__call__", broken)
    arguments = ("--samples", 5, "--seed", 9, "--no-likelihood", "--no-classification", "--out", tmp_path)
    code, text, _ = flowback("evaluate", model, *arguments)
    assert code == 0
    assert "1 of 5 images have values that are not finite: seed 11." in text


def test_images_that_exist_already(flowback, tmp_path):
    pixels = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    save_npz(pixels[:5], tmp_path / "samples.npz")
    save_npz(pixels, tmp_path / "reference.npz")
    code, text, _ = flowback(
        "evaluate", tmp_path / "samples.npz", "--reference", tmp_path / "reference.npz", "--out", tmp_path
    )
    assert code == 0
    assert "fd_efficientnet_lite0" in text
    assert read(tmp_path / "evaluate.json")["settings"]["samples"] == 5


def test_bad_input(flowback, model, tmp_path):
    np.savez(tmp_path / "other.npz", np.zeros((4, 32, 32, 3), dtype=np.uint8))
    np.savez(tmp_path / "code.npz", np.array([print], dtype=object))
    few = ("--samples", 4, "--out", tmp_path)
    cases = [
        ((model, *few, "--reference", tmp_path / "other.npz"), "32x32, but the samples are 16x16"),
        ((model, *few, "--reference", tmp_path / "code.npz"), "pickled objects"),
        ((model, *few, "--search", "1:2"), "FIRST:LAST:STEP"),
        ((model, "--samples", 1), "at least 2"),
        ((model, *few, "--tolerance", 0), "--tolerance 0 must be above 0"),
        ((model, *few, "--protocol", "adm", "--inception-weights", tmp_path / "none.pth"), "cannot be read"),
        ((model, *few, "--data", "digits"), "10 classes, the model 2"),
        ((model, *few, "--device", "abacus"), "--device abacus"),
        ((tmp_path / "other.npz", "--out", tmp_path), "--reference"),
        ((tmp_path / "nowhere", "--out", tmp_path), "neither a checkpoint"),
    ]
    for arguments, sentence in cases:
        code, _, error = flowback("evaluate", *arguments)
        assert code == 2, arguments
        assert sentence in error
        assert error.count("\n") == 1


def test_images_write_nothing_that_was_not_asked_for(flowback, model, tmp_path, monkeypatch):
    for name in ("drawn", "real"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("L", (16, 16), 9 * index).save(tmp_path / name / f"{index}.png")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    words = ("evaluate", tmp_path / "drawn", "--reference", tmp_path / "real", "--device", "cpu")
    code, out, error = flowback(*words)
    assert code == 0, error
    assert "No report is written: --json FILE or --out FOLDER writes one." in out
    assert list(here.iterdir()) == []
    (tmp_path / "real" / "bad.png").write_bytes(b"no picture")
    assert flowback(*words)[0] == 2
    assert flowback(*words, "--data.bad-images", "skip", "--json", "report.json")[0] == 0
    assert [file.name for file in here.iterdir()] == ["report.json"]
    code, _, error = flowback("classify", "someone/nothing-here")
    assert code == 2
    assert "No checkpoint at someone/nothing-here" in error
