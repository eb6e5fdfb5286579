from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flowback import InputError, files, provenance


def test_environment_says_what_it_takes_to_repeat_a_figure():
    found = provenance.environment()
    assert found["device"].startswith("cpu: ")
    assert found["device"].endswith(f"{torch.get_num_threads()} threads")
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert set(found) == {"device", "platform", "versions", "commit", "command", "date"}
    json.dumps(found)


def test_commit_is_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.environment()["commit"] is None


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.replacing(path) as file:
        file.write("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_of_others_is_refused_before_the_work(tmp_path, monkeypatch):
    files.check_file(tmp_path / "new" / "file.json", "--json")
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"--json .*file\.json cannot be written: .* is write-protected"):
        files.check_file(tmp_path / "new" / "file.json", "--json")


@pytest.mark.parametrize("inside", [".", "new", "cats/deep/new", "../link/new"])
def test_a_place_among_the_images_is_refused(tmp_path, inside):
    """What is written there would be a class of the set, the next time it is read."""
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with pytest.raises(InputError, match=r"--out .* lies in .*photos, the folder of the images"):
        files.check_outside(tmp_path / "photos" / inside, tmp_path / "photos")
    files.check_outside(tmp_path / "photos2", tmp_path / "photos")


def test_a_failure_in_the_middle_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with files.replacing(path) as file:
            file.write("half of the n")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_binary_files_too(tmp_path):
    with files.replacing(tmp_path / "file", mode="wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "file").read_bytes() == b"\x00\xff"


def test_json_is_readable_by_anything(tmp_path):
    path = tmp_path / "data.json"
    data = {
        "nan": math.nan,
        "infinite": [math.inf, (1.5, -math.inf)],
        "path": Path("a/b"),
        3: "key",
        "numpy": np.float32(0.5),
        "array": np.arange(3),
        "tensor": torch.tensor(2.5),
        "vector": torch.tensor([1.0, math.nan]),
        "true": np.bool_(True),
    }
    files.write_json(path, data)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "nan": None,
        "infinite": [None, [1.5, None]],
        "path": "a/b",
        "3": "key",
        "numpy": 0.5,
        "array": [0, 1, 2],
        "tensor": 2.5,
        "vector": [1.0, None],
        "true": True,
    }
