"""``flowback distil`` and what the other verbs do with a student."""

import json

import pytest
import torch

import runs
from flowback import Flow
from flowback.cli import main
from flowback.sampling.image_files import read_png


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    flow = Flow(runs.tiny_config().model, tuple("0123456789"))
    flow.run = runs.tiny_config()
    folder = tmp_path_factory.mktemp("distil") / "teacher"
    flow.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(teacher):
    out = teacher.parent / "student"
    words = ["--method", "matching", "--train.steps", "2", "--train.eval-every", "2"]
    assert (
        main(["distil", str(teacher), "--out", str(out), *words, "--json", str(out.parent / "r.json")]) == 0
    )
    return out


def test_settings_are_the_teachers(teacher, student):
    config = json.loads((student / "config.json").read_text())
    assert config["student"]["method"] == "matching"
    assert config["student"]["teacher"] == str(teacher)
    assert (config["train"]["batch_size"], config["train"]["steps"]) == (16, 2)
    assert json.loads((student.parent / "r.json").read_text())["result"]["loss"] > 0


def test_a_student_is_sampled_beside_its_teacher(flowback, student, tmp_path):
    words = [
        "sample",
        student,
        "--out",
        tmp_path / "out",
        "--count",
        "3",
        "--labels",
        "1",
        "--evaluations",
        "2",
    ]
    code, out, err = flowback(*words, "--compare", tmp_path / "compare.png", "--device", "cpu")
    assert code == 0, err
    note = json.loads((tmp_path / "out/sampling.json").read_text())
    assert (note["student"], note["evaluations"], note["solver"]) == ("matching", 2, "euler")
    picture, _ = read_png(tmp_path / "compare.png")
    assert picture.shape[1] == 3 * (64 + 2) + 2
    assert "images drawn" in out


@pytest.mark.parametrize(
    ("verb", "words", "sentence"),
    [
        ("sample", ["student", "--out", "x", "--evaluations", "0"], "--evaluations 0 must be at least 1"),
        ("sample", ["teacher", "--out", "x", "--compare", "c.png"], "this model is a flow; leave it out"),
        ("sample", ["teacher", "--out", "x", "--evaluations", "2"], "--evaluations is of students"),
        (
            "sample",
            ["student", "--out", "x", "--compare", "c.png", "--teacher", "no"],
            "Give it as --teacher",
        ),
        ("classify", ["student"], "holds a student, not a flow"),
        ("distil", ["student", "--out", "x"], "holds a student, not a flow"),
        ("distil", ["teacher", "--out", "x", "--preset", "digits"], "The preset digits trains a flow"),
        ("distil", ["teacher", "--out", "x", "--train.init-from", "y"], "--train.init-from gives weights of"),
        ("train", ["student-fashion", "--out", "x"], "use flowback distil"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    flowback, teacher, student, tmp_path, monkeypatch, verb, words, sentence
):
    monkeypatch.chdir(tmp_path)
    named = {"student": student, "teacher": teacher}
    code, _, err = flowback(verb, *(named.get(word, word) for word in words))
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_info_counts_the_students_weights(flowback, student):
    code, out, err = flowback("info", student)
    assert code == 0, err
    assert "student" in out
