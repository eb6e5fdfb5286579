"""Whatever a visitor sends ends in a value that fits, or in one sentence."""

import base64
import json
import math
import struct
import zlib
from io import BytesIO

import pytest
import torch
from PIL import Image

from app.conftest import CONFIG
from flowback import InputError
from flowback.app import inputs
from flowback.app.inputs import EACH, NONE, guidance_scale, read_label, read_labels, read_picture, read_seed
from flowback.data.pixels import decode


def url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def field(data, **more):
    return json.dumps({"image": url(data), **more})


def png(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side=60_000):
    """A PNG of 10 kB that would take side² bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**7)))


def test_a_picture_is_read_as_data_sets_are():
    data = png(Image.effect_noise((40, 30), 90))
    found = read_picture(field(data, marked=[0, 15]), CONFIG)
    levels = torch.from_numpy(decode(data, 8, 1).copy()).float()
    assert torch.equal(found.image, levels[None] / 127.5 - 1)
    assert found.redraw.nonzero()[:, 1].tolist() == [0, 15]


@pytest.mark.parametrize("text", ["", None, "{}", '{"image": "", "marked": [3]}'])
def test_an_empty_field(text):
    found = read_picture(text, CONFIG)
    assert found.image is None
    assert found.redraw.sum() == (3 in json.loads(text or "{}").get("marked", []))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (bomb(7_000), "too many pixels"),
        (bomb(), "too many pixels. Choose a PNG, JPEG or WebP of at most 40 million pixels"),
        (b"MZ\x90\x00" * 99, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not an image"),
        (b"%PDF-1.7 ...", "not an image"),
        (png(Image.new("L", (64, 64)))[:60], "cannot be used"),
        (b"", "cannot be used"),
    ],
    ids=["large", "bomb", "program", "svg", "pdf", "cut", "empty"],
)
def test_hostile_files_get_a_sentence(data, sentence):
    with pytest.raises(InputError, match=sentence):
        read_picture(field(data), CONFIG)


def test_files_that_are_too_large_are_not_even_decoded(monkeypatch):
    monkeypatch.setattr(inputs, "MOST_BYTES", 2**20)
    monkeypatch.setattr(inputs.base64, "b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match="larger than 1 MB; choose a smaller one"):
        read_picture(json.dumps({"image": url(bytes(2**20 + 9))}), CONFIG)


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        "3",
        7,
        {"image": "data:;base64,AAAA"},
        "[" * 100_000,
        '{"image": 3}',
        '{"image": "/etc/passwd"}',
        '{"image": "file:///etc/passwd"}',
        '{"image": "http://127.0.0.1/x.png"}',
        '{"image": "data:image/png;base64,@@@@"}',
        '{"image": "", "marked": [-1]}',
        '{"image": "", "marked": [16]}',
        '{"image": "", "marked": ["a"]}',
        '{"image": "", "marked": 5}',
    ],
    ids=lambda text: str(text)[:40],
)
def test_fields_that_no_page_sends(text):
    with pytest.raises(InputError, match="did not arrive whole"):
        read_picture(text, CONFIG)


@pytest.mark.parametrize("value", [-1, 2**32 - 1, 1.5, math.nan, math.inf, "7", None, [1]])
def test_bad_seeds(value):
    with pytest.raises(InputError, match="The seed is a whole number from 0 to"):
        read_seed(value)


def test_numbers_of_a_page_are_floats_at_times():
    assert read_seed(7.0) == 7
    assert read_label(2.0, CONFIG) == 2


def test_classes():
    assert read_labels(EACH, CONFIG, 4) == [0, 1, 2, 0]
    assert read_labels(1, CONFIG, 2) == [1, 1]
    assert read_labels(NONE, CONFIG, 2) is None
    for bad in (3, -1, "cat", None):
        with pytest.raises(InputError, match="A class is a whole number from 0 to 2"):
            read_label(bad, CONFIG)


def test_guidance():
    assert guidance_scale(1.5, labelled=True) == 1.5
    for bad in (-1, 11, math.nan, "2", None):
        with pytest.raises(InputError, match="Guidance is a number from 0 to 10"):
            guidance_scale(bad, labelled=True)
    with pytest.raises(InputError, match="Guidance needs a class: choose one, or set guidance to 0"):
        guidance_scale(1, labelled=False)
