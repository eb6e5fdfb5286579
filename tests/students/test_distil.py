"""Training a student: the same loop, resumed bit for bit; what it refuses; the teacher stays as it is."""

import dataclasses
import json

import pytest
import torch

import flowback
import runs
from flowback import Flow, InputError, RunConfig, Student, StudentConfig, checkpoint
from flowback.model import load_teacher
from flowback.sampling.block_plan import weights_hash
from flowback.students.losses import encode_states
from flowback.training import student_config
from flowback.training.batches import batches


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run's folder that holds a random flow with a run's settings: nothing is trained."""
    torch.manual_seed(0)
    config = runs.tiny_config()
    folder = tmp_path_factory.mktemp("teacher") / "checkpoint"
    flow = Flow(config.model, tuple("0123456789"))
    torch.nn.init.normal_(flow.blocks[0].proj_out.weight, std=0.05)
    flow.run = dataclasses.replace(config, classes=flow.classes)
    flow.save_pretrained(folder)
    return folder


def distil(teacher, out, images=None, steps=4, **student):
    config = student_config(Flow.from_pretrained(teacher))
    train = dataclasses.replace(config.train, steps=steps, save_every=2, log_every=2, warmup_steps=1)
    return flowback.distil(teacher, images, out, config=dataclasses.replace(config, train=train), **student)


@pytest.mark.parametrize(
    ("student", "losses"),
    [
        ({"method": "inverse", "guidance": 1.0}, {"loss", "image", "hidden_1", "hidden_2"}),
        ({"method": "matching"}, {"loss", "velocity"}),
        ({"method": "matching", "coupling": "independent"}, {"loss", "velocity"}),
    ],
)
def test_a_student_trains_resumes_and_is_loaded(teacher, digits, tmp_path, student, losses):
    before = weights_hash(Flow.from_pretrained(teacher))
    result = distil(teacher, tmp_path / "whole", digits, **student)
    assert losses <= result.metrics.keys()
    assert "nll" not in result.metrics
    distil(teacher, tmp_path / "parts", digits, **student)
    (tmp_path / "parts/checkpoints/step-00000004").rename(tmp_path / "gone")
    distil(teacher, tmp_path / "parts", digits, **student)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "parts")
    loaded = flowback.load(result.folder)
    assert isinstance(loaded, Student)
    assert loaded.classes == tuple("0123456789")
    assert loaded.run.student.teacher_weights == before == weights_hash(load_teacher(loaded.student))
    assert len(loaded.run.student.rms) == 3
    loaded.save_pretrained(tmp_path / "saved")
    again = flowback.load(tmp_path / "saved")
    assert torch.equal(again.sample([3], [5]), loaded.sample([3], [5]))


def test_a_teacher_with_a_range_of_noise_levels_teaches_what_it_draws(digits, tmp_path):
    """Its states are those of images with the highest noise, the level that it draws at."""
    model = dataclasses.replace(
        runs.tiny_config().model, noise="range", noise_min=0.05, noise_max=0.5, width=16
    )
    flow = Flow(model, tuple("0123456789"))
    flow.run = dataclasses.replace(runs.tiny_config(), model=model, classes=flow.classes)
    flow.save_pretrained(tmp_path / "teacher")
    config = student_config(flow)
    first = next(batches(digits, dataclasses.replace(config, classes=flow.classes), 0, 0, 1, flow.device))
    assert first.levels.tolist() == [0.5] * 16
    assert (first.noised - first.clean).std().item() == pytest.approx(0.5, abs=0.05)
    result = distil(tmp_path / "teacher", tmp_path / "student", digits, steps=2, method="inverse")
    assert result.metrics["loss"] > 0
    noised = first.noised
    exact = flow(noised, first.labels, noise=torch.full((16,), 0.5)).z
    assert torch.equal(encode_states(flow, noised, first.labels)[-1], exact.detach())


def test_accumulated_parts_give_the_same_step(teacher, digits, tmp_path):
    """Chance and noise go with their images: micro-batches change sums' order only (1e-4 after 4 steps)."""
    config = student_config(Flow.from_pretrained(teacher))
    found = []
    for micro in (None, 5):
        train = dataclasses.replace(config.train, steps=4, micro_batch=micro, log_every=2)
        options = dataclasses.replace(config, train=train)
        row = flowback.distil(
            teacher, digits, tmp_path / str(micro), config=options, method="matching"
        ).metrics
        found.append(row["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_loss_in_features_is_part_of_the_record(teacher, digits, tmp_path):
    @flowback.register_encoder("students-grey")
    def make(_):
        from torch import nn

        class Grey(flowback.Encoder):
            def feature_map(self, images, size):
                grey = nn.functional.interpolate(images.mean(1, keepdim=True), size=(size, size))
                return nn.functional.pixel_unshuffle(grey, 4)

        return Grey(
            "students-grey", nn.Identity(), flowback.Recipe(dim=16, stride=4, mean=(0.5,) * 3, std=(0.5,) * 3)
        )

    result = distil(teacher, tmp_path, digits, steps=2, method="inverse", features="students-grey")
    assert result.metrics["features"] > 0
    assert json.loads((tmp_path / "config.json").read_text())["student"]["features"] == "students-grey"


def test_what_cannot_be_a_teacher_is_refused(teacher, digits, tmp_path):
    student = distil(teacher, tmp_path / "student", digits, steps=2).folder
    with pytest.raises(InputError, match="holds a student, not a flow"):
        distil(student, tmp_path / "x", digits)
    with pytest.raises(InputError, match="holds a flow, not a student"):
        Student.from_pretrained(teacher)
    with pytest.raises(InputError, match="folder does not exist"):
        flowback.distil(tmp_path / "nowhere", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    settings = Student.from_pretrained(student).run
    with pytest.raises(InputError, match="use flowback distil"):
        flowback.train(settings, digits, tmp_path / "x")


def test_a_teacher_that_is_missing_or_another_is_refused(teacher, tmp_path):
    student = StudentConfig("inverse", str(tmp_path / "gone"), "0" * 64)
    with pytest.raises(InputError, match=r"teacher cannot be used.*Give it as --teacher"):
        load_teacher(student)
    with pytest.raises(InputError, match="is not the student's teacher: the SHA-256"):
        load_teacher(student, where=str(teacher))


def test_classes_that_do_not_match_are_refused(teacher, tmp_path):
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    other = flowback.image_set(images, torch.tensor([0, 1, 0, 1]), classes=("cat", "dog"))
    with pytest.raises(InputError, match="classes"):
        distil(teacher, tmp_path / "x", other)


def test_settings_that_exclude_each_other_are_refused():
    for options, sentence in (
        ({"method": "inverse", "coupling": "independent"}, "belongs to --student.method matching"),
        ({"method": "matching", "guidance": 1.0}, "belong to --student.method inverse"),
        ({"clip": 0.0}, "--student.clip must be above 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            StudentConfig(**options)


def test_old_settings_have_no_student(tmp_path):
    from flowback.checked import from_dict, to_dict

    values = to_dict(RunConfig())
    del values["student"]
    assert from_dict(RunConfig, values) == RunConfig()
    assert not RunConfig().student.active
    folder = tmp_path / "flow"
    Flow(runs.tiny_config().model).save_pretrained(folder)
    assert isinstance(flowback.load(folder), Flow)
    assert checkpoint.load_config(folder).student == StudentConfig()
