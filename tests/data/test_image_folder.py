"""Folders of images: layout, splits, bad files, and reading in memory and on demand."""

import logging
import pickle
import random

import pytest
import torch
from PIL import Image

from flowback import DataConfig, InputError, load_images
from flowback.data import image_folder as module
from flowback.data.image_folder import FolderImages, load_folder


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def load(path, split="train", **options):
    return load_folder(DataConfig("folder", path=path, **options), 4, 1, split)


def values(images):
    """One grey value for each image, since each is of one colour."""
    return images.read(torch.arange(len(images))).flatten(1).float().mean(1).int().tolist()


def files(images):
    return [images.file_name(index) for index in range(len(images))]


@pytest.fixture(params=["memory", "on read"])
def kind(request, monkeypatch):
    if request.param == "on read":
        monkeypatch.setattr(module, "MEMORY_LIMIT", 0)
    return request.param


def test_classes_are_sub_folders(tmp_path, kind):
    write(tmp_path / "dog" / "a.png", 1)
    write(tmp_path / "cat" / "deep" / "b.PNG", 2)
    write(tmp_path / "cat" / "a.png", 3)
    write(tmp_path / "cat" / ".hidden.png", 4)
    (tmp_path / "cat" / "notes.txt").write_text("not part of the set")
    (tmp_path / "empty").mkdir()
    images = load(tmp_path, holdout=0.0)
    assert isinstance(images, FolderImages) == (kind == "on read")
    assert images.classes == ("cat", "dog")
    assert files(images) == ["cat/a.png", "cat/deep/b.PNG", "dog/a.png"]
    assert images.labels.tolist() == [0, 0, 1]
    assert values(images) == [3, 2, 1]
    assert images.skipped == ()


def test_no_sub_folders_is_unconditional(tmp_path, kind):
    write(tmp_path / "b.png", 1)
    write(tmp_path / "a.png", 2)
    images = load(tmp_path, holdout=0.0)
    assert (images.classes, images.labels, values(images)) == ((), None, [2, 1])


@pytest.mark.parametrize("name", ["test", "val"])
def test_own_split_is_used(tmp_path, name):
    write(tmp_path / "train" / "cat" / "a.png", 1)
    write(tmp_path / "train" / "dog" / "a.png", 2)
    write(tmp_path / name / "dog" / "b.png", 3)
    train, test = load(tmp_path), load(tmp_path, "test")
    assert (train.classes, train.labels.tolist(), values(train)) == (("cat", "dog"), [0, 1], [1, 2])
    assert (test.classes, test.labels.tolist(), values(test)) == (("cat", "dog"), [1], [3])


def test_train_alone_is_no_class(tmp_path):
    for index in range(20):
        write(tmp_path / "train" / "cat" / f"{index}.png")
    assert load(tmp_path).classes == ("cat",)
    assert len(load(tmp_path, "test")) > 0


def test_holdout_depends_on_names_only(tmp_path):
    names = [f"{index}.png" for index in range(200)]
    for name in names[:100]:
        write(tmp_path / name)
    train, test = set(files(load(tmp_path, holdout=0.3))), set(files(load(tmp_path, "test", holdout=0.3)))
    assert train.isdisjoint(test)
    assert train | test == set(names[:100])
    assert 18 <= len(test) <= 42  # 30 expected, standard deviation 4.6
    for name in names[100:]:
        write(tmp_path / name)
    assert train <= set(files(load(tmp_path, holdout=0.3)))
    assert test <= set(files(load(tmp_path, "test", holdout=0.3)))


def test_holdout_of_few_images_is_never_empty(tmp_path):
    for index in range(3):
        write(tmp_path / f"{index}.png")
        if index:
            assert len(load(tmp_path, "test", holdout=1e-9)) == 1
            assert len(load(tmp_path, holdout=1e-9)) == index


def test_no_holdout_evaluates_on_the_training_images(tmp_path):
    write(tmp_path / "a.png")
    assert files(load(tmp_path, holdout=0.0)) == files(load(tmp_path, "test", holdout=0.0)) == ["a.png"]


def bad_folder(tmp_path):
    for index in range(6):
        write(tmp_path / "cat" / f"{index}.png", index)
    write(tmp_path / "dog" / "9.png", 9)
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "cat" / "2.png").write_bytes(b"text")
    whole = (tmp_path / "cat" / "5.png").read_bytes()
    (tmp_path / "cat" / "3.png").write_bytes(whole[:-20])
    (tmp_path / "cat" / "4.png").unlink()
    (tmp_path / "cat" / "4.png").symlink_to("gone.png")


def test_bad_images_are_refused_by_name_and_number(tmp_path):
    bad_folder(tmp_path)
    with pytest.raises(InputError) as caught:
        load(tmp_path, holdout=0.0)
    text = str(caught.value)
    assert text.startswith("4 of the 7 images in ")
    assert "cat/1.png (empty file), cat/2.png (not an image), cat/3.png (damaged" in text
    assert text.endswith(" and 1 more; repair or remove them, or leave them out with --data.bad-images skip.")


def test_bad_images_are_skipped(tmp_path, caplog):
    bad_folder(tmp_path)
    images = load(tmp_path, holdout=0.0, bad_images="skip")
    assert f"Skipped 4 of the 7 images in {tmp_path}: cat/1.png (empty file), cat/2.png (" in caplog.text
    assert values(images) == [0, 5, 9]
    assert images.labels.tolist() == [0, 0, 1]
    assert files(images) == ["cat/0.png", "cat/5.png", "dog/9.png"]
    assert len(images.skipped) == 4
    assert images.skipped[3] == "cat/4.png (no such file)"


def test_bad_images_on_read(tmp_path, monkeypatch, caplog):
    bad_folder(tmp_path)
    monkeypatch.setattr(module, "MEMORY_LIMIT", 0)
    images = load(tmp_path, holdout=0.0)
    assert len(images.fingerprint) == 32
    with pytest.raises(InputError, match=r"1 of the 7 images in .*cat/1.png \(empty file\)"):
        images.read(torch.tensor([0, 1]))
    with caplog.at_level(logging.WARNING):
        # The next readable image of the same class stands in, also past the end of the class.
        assert values(load(tmp_path, holdout=0.0, bad_images="skip")) == [0, 5, 5, 5, 5, 5, 9]
    assert "cat/2.png (not an image)" in caplog.text
    (tmp_path / "cat" / "5.png").write_bytes(b"")
    assert values(load(tmp_path, holdout=0.0, bad_images="skip")) == [0, 0, 0, 0, 0, 0, 9]
    (tmp_path / "dog" / "9.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"No image of the class of .*dog/9.png can be read"):
        values(load(tmp_path, holdout=0.0, bad_images="skip"))


def test_nothing_left_after_skipping(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="1 of the 1 images"):
        load(tmp_path, holdout=0.0, bad_images="skip")


def test_reading_in_worker_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY_LIMIT", 0)
    for index in range(8):
        write(tmp_path / f"{index}.png", index)
    images = pickle.loads(pickle.dumps(load(tmp_path, holdout=0.0)))
    loader = torch.utils.data.DataLoader(
        range(8), batch_size=4, num_workers=1, collate_fn=lambda batch: images.read(torch.tensor(batch))
    )
    read = torch.cat(list(loader))
    assert read[:, 0, 0, 0].tolist() == list(range(8))


def test_fingerprint_follows_the_images(tmp_path, kind):
    write(tmp_path / "a.png", 1)
    write(tmp_path / "b.png", 2)
    first = load(tmp_path, holdout=0.0).fingerprint
    assert load(tmp_path, holdout=0.0).fingerprint == first
    assert load_folder(DataConfig("folder", path=tmp_path, holdout=0.0), 8, 1, "train").fingerprint != first
    write(tmp_path / "b.png", 3)
    assert load(tmp_path, holdout=0.0).fingerprint != first


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "up").symlink_to(tmp_path / "set")
    assert files(load(tmp_path / "set", holdout=0.0)) == ["dog/a.png"]


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{index}.png" for index in range(10)]
    for name in random.Random(0).sample(names, 10):
        write(tmp_path / name)
    assert files(load(tmp_path, holdout=0.0)) == sorted(names)


def test_bad_layouts(tmp_path):
    with pytest.raises(InputError, match=r"--data\.name folder needs"):
        load(None)
    with pytest.raises(InputError, match="is not a folder"):
        load(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"holds no images \(files ending in .*\.png"):
        load(tmp_path)
    write(tmp_path / "a.png")
    with pytest.raises(InputError, match="holds one image"):
        load(tmp_path)
    write(tmp_path / "cat" / "a.png")
    with pytest.raises(InputError, match=r"both images \(a.png\) and folders of images \(cat\)"):
        load(tmp_path)
    (tmp_path / "a.png").unlink()
    write(tmp_path / "cat" / "b.png")
    with pytest.raises(InputError, match="leaves none of the 2 images"):
        load(tmp_path, holdout=0.9999)
    write(tmp_path / "train" / "cat" / "a.png")
    write(tmp_path / "test" / "horse" / "a.png")
    with pytest.raises(InputError, match=r"class folders of .*test are not those of .*train"):
        load(tmp_path, "test")


def animation(path):
    frames = [Image.new("L", (4, 4), value) for value in (7, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_animations_are_counted_and_named(tmp_path, kind, caplog):
    write(tmp_path / "a.png", 3)
    for name in ("b.gif", "c.tif"):
        animation(tmp_path / name)
    images = load(tmp_path, holdout=0.0)
    assert values(images) == values(images) == [3, 7, 7]
    expected = {
        "memory": [
            "Images with several frames or pages, of which the first is used: "
            f"2 of 3 in {tmp_path} (b.gif, c.tif)."
        ],
        "on read": [
            f"{tmp_path}/{name} has several frames or pages, of which the first is used."
            for name in ("b.gif", "c.tif")
        ],
    }
    assert [record.getMessage() for record in caplog.records] == expected[kind]


def test_a_useless_profile_is_counted(tmp_path, caplog):
    for index in range(10):
        Image.new("L", (4, 4), 5).save(tmp_path / f"{index}.png", icc_profile=b"no profile")
    assert values(load(tmp_path, holdout=0.0)) == [5] * 10
    assert "and is ignored: 10 of 10 in" in caplog.text
    assert "(0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png, 7.png, ...)." in caplog.text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("1", "2", "10"), "0 is 1, 1 is 10, 2 is 2."),
        (("1", "2", "3"), None),
        (("01", "02", "10"), None),
        (("a1", "a10", "a2"), None),
        (
            tuple(map(str, range(20))),
            "0 is 0, 1 is 1, 2 is 10, 3 is 11, 4 is 12, 5 is 13, 6 is 14, 7 is 15, "
            "8 is 16, 9 is 17, 10 is 18, 11 is 19, ...",
        ),
    ],
)
def test_numbers_in_the_order_of_text_are_shown(tmp_path, caplog, names, shown):
    """torchvision's order is kept; whoever trains sees which id is which."""
    for name in names:
        for split in ("train", "test"):
            write(tmp_path / split / name / "a.png")
    caplog.set_level("INFO", "flowback")
    images = load_images(DataConfig("folder", path=tmp_path), 4, 1, "train")
    assert images.classes == tuple(sorted(names))
    if shown is None:
        assert not caplog.records
    else:
        assert (
            f"The classes of {images.name} have ids in the order of their names as text: {shown}"
            in caplog.text
        )
    caplog.clear()
    load_images(DataConfig("folder", path=tmp_path), 4, 1, "test")
    assert not caplog.records
