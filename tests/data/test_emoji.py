"""Emoji: what is one piece of content, that no piece is split, and what is said of missing files."""

import numpy as np
import pytest
from PIL import Image

from flowback import DataConfig, InputError, load_images
from flowback.data import emoji as module
from flowback.data.emoji import FONT, LIST, content, read_emoji

LINES = """# group: Smileys & Emotion
1F600 ; fully-qualified # 😀 E1.0 grinning face
# group: People & Body
1F9D1 200D 1F680 ; fully-qualified # 🧑‍🚀 astronaut
1F468 1F3FD 200D 1F680 ; fully-qualified # 👨🏽‍🚀 man astronaut: medium skin tone
1F9D1 1F3FB 200D 2695 ; minimally-qualified # 🧑🏻‍⚕ health worker
# group: Component
1F3FB ; component # 🏻 light skin tone
"""

HERE = all((module._FOLDERS[name] / name).is_file() for name in (FONT, LIST))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / LIST).write_text(LINES)
    (tmp_path / FONT).write_bytes(b"no font")
    return tmp_path


def test_the_list_is_read_by_group_and_components_are_none(folder):
    found = module._read_list(folder / LIST)
    assert [each.group for each in found] == ["Smileys & Emotion", "People & Body", "People & Body"]
    assert [each.text for each in found] == ["😀", "🧑\u200d🚀", "👨🏽\u200d🚀"]
    assert content(found) == ["1f600", "1f9d1 1f680", "1f9d1 1f680"]


def square(value, spot=None):
    pixels = np.full((24, 24, 3), value, dtype=np.uint8)
    if spot is not None:
        pixels[spot : spot + 12, :12] = 0
    return Image.fromarray(pixels)


def test_what_is_alike_or_has_one_content_is_one_piece():
    """a and b share their content, b and c look alike, d and e are alone: links are followed to the end."""
    images = [square(200, 0), square(90), square(93), square(200, 12), square(30)]
    assert module._pieces(["a", "a", "c", "d", "e"], images) == ["a", "a", "a", "d", "e"]


def test_a_piece_is_in_one_part_only(folder, monkeypatch):
    """60 drawings in three tones of skin, drawn as noise that no two share; seed 0."""
    people = [chr(0x1F400 + number) for number in range(60)]
    texts = [person + tone for person in people for tone in ("", "\U0001f3fb", "\U0001f3ff")]
    points = [" ".join(f"{ord(point):X}" for point in text) for text in texts]
    (folder / LIST).write_text("# group: People\n" + "".join(f"{p} ; fully-qualified # x\n" for p in points))
    random = np.random.default_rng(0)
    drawn = [Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in texts]
    monkeypatch.setattr(module, "_draw", lambda emoji, font: drawn)
    data = DataConfig("emoji", folder)
    parts = [read_emoji(data, split) for split in ("train", "test")]
    numbers = [
        [next(i for i, d in enumerate(drawn) if d is image) for image in images] for images, *_ in parts
    ]
    assert sorted(numbers[0] + numbers[1]) == list(range(180))
    assert not {n // 3 for n in numbers[0]} & {n // 3 for n in numbers[1]}
    assert 20 <= len(numbers[1]) <= 60  # a fifth of 180 is 36
    images = load_images(data, 16, 3, "test")
    assert images.read(images.labels[:1]).shape == (1, 3, 16, 16)
    assert images.classes == ("People",)


@pytest.mark.parametrize("missing", [FONT, LIST])
def test_a_missing_file_names_its_package(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing} is not there; install .* {module._PACKAGES[missing]}"):
        read_emoji(DataConfig("emoji", folder), "train")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "lists no emoji"),
        ("XYZ ; fully-qualified # x", "is not Unicode's"),
        (b"\xff", "is not Uni"),
    ],
)
def test_a_damaged_list_is_named(folder, text, said):
    (folder / LIST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        read_emoji(DataConfig("emoji", folder), "train")


def test_a_damaged_font_is_named(folder):
    with pytest.raises(InputError, match=rf"{FONT} cannot be read as a font"):
        read_emoji(DataConfig("emoji", folder), "train")


@pytest.mark.skipif(not HERE, reason="Debian's fonts-noto-color-emoji and unicode-data are not installed")
def test_the_real_drawings(monkeypatch):
    """Every 40th of them, to be quick: in colour, and none is empty."""
    whole = module._read_list(module._FOLDERS[LIST] / LIST)
    monkeypatch.setattr(module, "_read_list", lambda path: whole[::40])
    images, labels, classes = read_emoji(DataConfig("emoji"), "train")
    assert len(classes) == 9
    assert set(labels) <= set(range(9))
    pixels = np.stack([np.asarray(image) for image in images])
    assert (pixels.min(axis=(1, 2, 3)) < 200).all()
    assert (pixels.max(axis=3) != pixels.min(axis=3)).any()
