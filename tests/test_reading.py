"""Bounds of what is read from files, each with a file that is made to break it."""

from __future__ import annotations

import io
import json
import os
import zipfile

import pytest
import torch

from flowback.errors import printable, shorten
from flowback.reading import parse_json, read_json, read_tensors, read_text, read_yaml
from fuzzing import little_room


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested too deep"),
        ('{"a": NaN}', "not finite"),
        ('{"a": [1e999]}', "not finite"),
        ("9" * 5000, "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        ("[1, 2]", "no JSON object"),
    ],
    ids=["lists", "objects", "NaN", "infinite", "digits", "bytes", "list"],
)
def test_json(file, text, sentence):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=sentence):
        read_json(file)
    file.write_text(json.dumps({"a": [1, {"b": None}]}))
    assert read_json(file) == {"a": [1, {"b": None}]}


def test_a_file_of_json_or_yaml_has_a_size(file):
    with file.open("wb") as stream:
        stream.truncate(2**40)  # a hole: nothing is written
    for read in (read_json, read_yaml):
        with little_room(), pytest.raises(ValueError, match="more than"):
            read(file)


def test_what_could_wait_for_ever_is_not_opened(file):
    os.mkfifo(file)
    for read in (read_json, read_yaml, read_tensors, read_text):
        with pytest.raises(OSError, match="Not a file"):
            read(file)
    with pytest.raises(IsADirectoryError):
        read_json(file.parent)


def test_text(file):
    file.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    assert read_text(file) == "caf\xe9\r\n"
    with pytest.raises(ValueError, match="more than 0 KiB"):
        read_text(file, limit=9)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_text(file)


@pytest.mark.parametrize(
    "text",
    [
        "a: 2001-99-99",
        "!!bool maybe",
        "a: [",
        "[" * 400,
        "a: !!python/name:os.system",
        b"a: \xe9",
        "a: !!int b",
    ],
)
def test_yaml(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"not YAML|too deep|not text"):
        read_yaml(file)
    file.write_text("﻿lr: [1.5, ~]")
    assert read_yaml(file) == {"lr": [1.5, None]}


def torch_file(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_tensors_take_no_more_than_the_file(file):
    whole = {"a": torch.ones(3), "b": [torch.zeros(2, 2).t(), 1, None]}
    file.write_bytes(torch_file(whole))
    assert torch.equal(read_tensors(file)["a"], torch.ones(3))
    for content, sentence in (
        (torch.zeros(1).expand(10**6, 10**6), "larger than its data"),
        (torch.zeros(3).to_sparse(), "sparse|damaged"),  # torch.load warns of it, which is an error in tests
        (torch.empty(10**12, device="meta"), "without data"),
        ([print], "only tensors"),
    ):
        file.write_bytes(torch_file({"a": content} if isinstance(content, torch.Tensor) else content))
        with little_room(), pytest.raises(ValueError, match=sentence):
            read_tensors(file)


def test_a_compressed_file_of_tensors_is_refused(file):
    """PyTorch would unpack it, to any size."""
    with (
        zipfile.ZipFile(io.BytesIO(torch_file({"a": torch.zeros(2**20)}))) as plain,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert file.stat().st_size < 2**16
    assert torch.load(file)["a"].shape == (2**20,)  # so it would
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(file)


def test_the_same_list_again_and_again(file):
    """Two to the power of 60 items, in 60 lists."""
    content = [0]
    for _ in range(60):
        content = [content, content]
    file.write_bytes(torch_file(content))
    assert len(read_tensors(file)) == 2


def test_text_for_messages():
    assert printable("caf\udce9\x1b[2J") == r"caf\udce9\x1b[2J"
    assert printable("Ünï 写真 \u202f") == "Ünï 写真 \u202f"
    assert shorten(" two\nlines") == "two"
    assert shorten("") == ""
    assert parse_json(b"1") == 1
