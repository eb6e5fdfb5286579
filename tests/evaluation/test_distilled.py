"""A student judged by its teacher: a perfect student, a wrong one, and the record of the command."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import flowback
from flowback import InputError, RunConfig, Sampler, Student, StudentConfig
from flowback.alignment.encoders import Encoder, Recipe
from flowback.data.image_set import MemoryImages
from flowback.data.pixels import Faults, quantise
from flowback.evaluation.distilled import GROUPS, draw_pairs
from flowback.evaluation.judge import Judge
from flowback.evaluation.metrics import Moments, frechet_distance, jackknife
from flowback.evaluation.references import Reference
from flowback.sampling.block_plan import weights_hash
from sampling.flows import tame_flow

IMAGES = MemoryImages(
    "set",
    tuple("abc"),
    torch.arange(24) % 3,
    torch.randint(0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8),
)


class Grey(Encoder):
    """Four grey means of an image: features of a small covariance."""

    def feature_map(self, images, size):
        grey = torch.nn.functional.interpolate(images.mean(1, keepdim=True), size=(2, 2))
        return grey.flatten(1)[:, :, None, None]


@pytest.fixture
def judge(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))
    encoder = Grey("grey", torch.nn.Identity(), Recipe(dim=4, stride=4, mean=(0.5,) * 3, std=(0.5,) * 3))
    return Judge(Reference("set", IMAGES.fingerprint, IMAGES), encoder)


def flow_of(dtype=torch.float32):
    return tame_flow(dtype, num_classes=3, image_size=8, channels=1, patch_size=4, blocks=2)


def pixels(images):
    return quantise(images.float(), ["x"] * len(images), Faults(), "nearest")


def test_a_perfect_student_has_no_error_and_its_teachers_figures(judge):
    flow = flow_of()
    exact = Sampler(flow)
    parts = [torch.arange(0, 12), torch.arange(12, 24)]
    figures = draw_pairs(flow, exact, exact, judge, pixels, parts).figures(judge.encoded)
    assert figures["inverse_error"] == figures["inverse_error_q95"] == 0
    assert figures["fd_ratio"] == 1
    assert figures["nll_student"] == figures["nll_teacher"]
    assert figures["top1_gradient_student"] == figures["top1_gradient_teacher"]
    assert figures["inverse_error_of_other_noise"] > 0.1


def test_errors_and_likelihoods_are_those_of_each_image(judge):
    """Also when two processes have drawn a half each."""
    flow = flow_of()
    exact = Sampler(flow)

    def wrong(labels, seeds):
        return exact(labels, seeds) + 0.5

    halves = [torch.arange(0, 12), torch.arange(12, 24)]
    pairs = draw_pairs(flow, wrong, exact, judge, pixels, halves)
    first, second = (draw_pairs(flow, wrong, exact, judge, pixels, [half]) for half in halves)
    assert torch.allclose(pairs.errors, torch.full((24,), 0.5), atol=1e-6)
    figures = pairs.figures(judge.encoded)
    assert first.merge(second).figures(judge.encoded) == pytest.approx(figures, rel=1e-6)
    labels = torch.arange(24) % 3
    noised = flow.add_noise(wrong(labels, range(24)), range(24))
    expected = -flow.log_prob(noised, labels).detach().double().mean() / flow.config.dims
    assert figures["nll_student"] == pytest.approx(float(expected), rel=1e-6)
    assert figures["fd_efficientnet_lite0_error"] > 0


def test_jackknife_of_a_distance():
    """By its definition, from all rows but those of one group."""
    random = torch.Generator().manual_seed(0)
    rows, reference = torch.randn(40, 3, generator=random), Moments.of(torch.randn(90, 3, generator=random))
    groups = list(rows.chunk(4))
    left = [
        frechet_distance(Moments.of(torch.cat([g for i, g in enumerate(groups) if i != k])), reference)
        for k in range(4)
    ]
    mean = sum(left) / 4
    expected = (3 / 4 * sum((d - mean) ** 2 for d in left)) ** 0.5
    assert jackknife([Moments.of(g) for g in groups], reference) == pytest.approx(expected, rel=1e-9)
    assert GROUPS == 10


def test_the_record_of_a_student_cites_its_teacher(judge, tmp_path, monkeypatch):
    monkeypatch.setattr("flowback.evaluation.pipeline._judge", lambda *_: judge)
    flow = flow_of()
    flow.classes = IMAGES.classes
    flow.save_pretrained(tmp_path / "teacher")
    settings = StudentConfig("inverse", str(tmp_path / "teacher"), weights_hash(flow), rms=(1.0, 1.0, 1.0))
    student = Student(flow.config, settings, IMAGES.classes)
    student.run = RunConfig(flow.config, classes=IMAGES.classes, student=settings)
    report = flowback.evaluate(student, IMAGES, reference=IMAGES, samples=6, limit=6)
    assert report.settings["teacher"]["weights_sha256"] == weights_hash(flow)
    assert report.settings["weights_sha256"] == weights_hash(student)
    assert report.settings["student"]["features"] is None
    wanted = {"inverse_error", "nll_student", "nll_teacher", "nll_test", "top1_gradient_student", "fd_ratio"}
    assert wanted <= report.figures.keys()
    student.student = dataclasses.replace(settings, teacher_weights="0" * 64)
    with pytest.raises(InputError, match="is not the student's teacher"):
        flowback.evaluate(student, IMAGES, reference=IMAGES, samples=6)
