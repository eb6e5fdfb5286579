"""What `flowback prepare` reads: labels stay whole, and what could be read in two ways is refused."""

import io
import os
import tarfile

import pytest
from PIL import Image

from flowback import InputError
from flowback.data.hf_datasets import open_hub
from flowback.data.sources import open_source


def files(folder, *names):
    """Empty files; nothing reads them here."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def labelled(folder, text):
    """Name and class of each training image, by a file of labels."""
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    source = open_source(str(folder), 8, 3, 0.0, folder / "labels.csv")["train"]
    return {name: source.classes[k] for name, k in zip(source.files, source.labels.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png,golden retriever\nb.png,golden eagle\n", ["golden retriever", "golden eagle"]),
        ("\ufeffa,golden  eagle\nb,cat 9\n", ["golden eagle", "cat 9"]),  # a mark of byte order, no heading
        ("a,n01440764 1 2 3 4\nb,n01443537 1 2 3 -4 n01443537 5 6 7 8\n", ["n01440764", "n01443537"]),
        ('a,"fish, gold"\nb,tench\n', ["fish, gold", "tench"]),
        ("image,class,width\na,cat,640\nb,dog,480\n", ["cat", "dog"]),
    ],
    ids=["words", "mark of byte order", "prediction strings", "quoted comma", "further columns"],
)
def test_a_class_is_the_whole_second_column(tmp_path, text, expected):
    found = labelled(files(tmp_path, "a.png", "b.png"), text)
    assert found == dict(zip(("a.png", "b.png"), expected, strict=True))


def test_images_that_differ_in_their_ending_only(tmp_path):
    files(tmp_path, "a.png", "a.jpg", "b.c.png")
    assert labelled(tmp_path, "a.png,cat\na.jpg,dog\nb.c,eel\n") == {
        "a.png": "cat",
        "a.jpg": "dog",
        "b.c.png": "eel",
    }
    with pytest.raises(InputError, match=r"line 1: a may be a\.jpg or a\.png; give the ending, too"):
        labelled(tmp_path, "a,cat\nb.c,eel\n")


def test_a_comma_in_a_class_is_no_column(tmp_path):
    with pytest.raises(InputError, match="line 2: 3 columns, not `image,class`; put a class with a comma in"):
        labelled(files(tmp_path, "a.png", "b.png"), "a,cat\nb,fish, gold\n")


def test_an_image_of_that_name_on_both_sides(tmp_path):
    files(tmp_path, "train/0.png", "test/0.png")
    with pytest.raises(InputError, match=r"0\.png is in .*train and in .*test, so --labels .* does not say"):
        labelled(tmp_path, "0,cat\n")


def test_imagenet_has_a_test_folder_without_labels_too(tmp_path):
    """Class folders in `train`, flat folders in `val` and `test`, and a list of `val`; or folders in both."""
    files(tmp_path, "train/ant/0.png", "train/bee/1.png", "val/v0.png", "val/v1.png", "test/t0.png")
    (tmp_path / "val.csv").write_text("v0,bee 1 2 3 4\nv1,ant 1 2 3 4\n")
    test = open_source(str(tmp_path), 8, 3, 0.0, tmp_path / "val.csv")["test"]
    assert (test.files, test.labels.tolist()) == (("v0.png", "v1.png"), [1, 0])
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / "val" / name).mkdir()
        (tmp_path / f"val/v{number}.png").rename(tmp_path / f"val/{name}/v{number}.png")
    test = open_source(str(tmp_path), 8, 3, 0.0)["test"]
    assert (test.files, test.labels.tolist()) == (("ant/v0.png", "bee/v1.png"), [0, 1])


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def sharded(folder, *members, name="all.tar"):
    """Name and class of each training image of a shard; None: no classes."""
    write_shard(folder / name, [(member, content) for member, content in members])
    source = open_source(str(folder), 8, 3, 0.0)["train"]
    labels = source.labels.tolist() if source.labels is not None else [None] * len(source)
    return dict(zip(source.names, labels, strict=True))


def test_members_of_a_sample_may_stand_apart(tmp_path):
    """As `tar cf x.tar *.png *.cls` writes them."""
    assert sharded(tmp_path, ("0.png", b"x"), ("1.png", b"x"), ("0.cls", b"3"), ("1.cls", b"1")) == {
        "0.png": 3,
        "1.png": 1,
    }
    more = [("0.png", b"x"), ("0.cls", b"3"), ("0.json", b'{"by": "me"}')]  # without a label of its own
    assert sharded(tmp_path, *more) == {"0.png": 3}


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("0.png", b""), ("0.mask.png", b"")], r"0\.png and 0\.mask\.png are two images of one sample"),
        ([("v1.0.jpg", b""), ("v1.1.jpg", b"")], r"v1\.0\.jpg and v1\.1\.jpg are two images of one sample"),
        (
            [("0.png", b""), ("0.cls", b"1"), ("0.json", b'{"label": 2}')],
            r"0\.cls and 0\.json give one image",
        ),
        ([("0.png", b""), ("1.cls", b"1")], r"1\.cls gives a class, but no image in this shard has its name"),
        ([("0.png", b""), ("0.cls", b"50000000")], "the label 50000000, but only 1 images; if it is right"),
        ([("0.png", b""), ("0.cls", b"true")], "holds the label true; labels are numbers from 0"),
        ([("0.png", b""), ("0.cls", b"-1")], "holds the label -1; labels are numbers from 0"),
        ([("0.png", b""), ("0.cls", b"null")], "holds the label null; labels are numbers from 0"),
        ([("0.png", b""), ("0.cls", b"[1]")], "holds the label a list; labels are numbers from 0"),
    ],
    ids=["mask", "dots", "two labels", "no image", "many classes", "true", "negative", "null", "list"],
)
def test_shards_that_can_be_read_in_two_ways(tmp_path, members, sentence):
    with pytest.raises(InputError, match=sentence):
        sharded(tmp_path, *members)


@pytest.mark.parametrize("reader", ["--labels", "classes.txt"])
def test_files_of_names_that_cannot_be_read(tmp_path, reader):
    """A pipe would wait for ever, and Latin-1 is not UTF-8."""
    (tmp_path / "0.png").touch()

    def read():
        if reader == "--labels":
            return open_source(str(tmp_path), 8, 3, 0.0, tmp_path / "names")
        return sharded(tmp_path / "shards", ("0.png", b""), ("0.cls", b"1"))

    (tmp_path / "shards").mkdir()
    file = tmp_path / "names" if reader == "--labels" else tmp_path / "shards" / "classes.txt"
    os.mkfifo(file)
    with pytest.raises(InputError, match=f"{reader}.* cannot be read: Not a file; "):
        read()
    file.unlink()
    file.write_bytes(b"0.png,caf\xe9\n")
    with pytest.raises(InputError, match=f"{reader}.* cannot be read: it is not text in UTF-8; "):
        read()


def test_names_of_classes_in_shards_differ(tmp_path):
    (tmp_path / "classes.txt").write_text("crane\nmaillot\ncrane\n")
    with pytest.raises(InputError, match=r"classes\.txt names two classes 'crane'"):
        sharded(tmp_path, ("0.png", b""), ("0.cls", b"1"))


def test_shards_for_the_test_without_labels_are_left_out(tmp_path):
    for name in ("train-0", "val-0"):
        write_shard(tmp_path / f"{name}.tar", [(f"{name}.png", b""), (f"{name}.cls", b"1")])
    write_shard(tmp_path / "test-0.tar", [("t.png", b"")])
    sources = open_source(str(tmp_path), 8, 3, 0.1)
    assert {split: source.names for split, source in sources.items()} == {
        "train": ("train-0.png",),
        "test": ("val-0.png",),
    }


def hub_set(folder, splits):
    """Save splits {name: {column: (type, values)}} as `datasets` does, and open them."""
    import datasets

    tables = {
        name: datasets.Dataset.from_dict(
            {column: values for column, (_, values) in columns.items()},
            features=datasets.Features({column: kind for column, (kind, _) in columns.items()}),
        )
        for name, columns in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(folder)
    return open_hub(str(folder), 0.0)


def hub_columns(labels=(0, 1), names=("cat", "dog"), **more):
    import datasets

    picture = Image.new("RGB", (2, 2))
    columns = {"image": (datasets.Image(), [picture] * len(labels))}
    if names is not None:
        columns["label"] = (datasets.ClassLabel(names=list(names)), list(labels))
    return {**more, **columns}


def test_columns_and_splits_of_hugging_face_sets(tmp_path):
    """A mask before the image; a test split without labels, as ImageNet's; names in another order."""
    import datasets

    mask = (datasets.Image(), [Image.new("L", (2, 2))] * 2)
    sources = hub_set(
        tmp_path,
        {
            "train": hub_columns(mask=mask),
            "test": hub_columns((-1, -1)),
            "validation": hub_columns((0, 1), ("dog", "cat")),
        },
    )
    assert (sources["train"].image, sources["train"].classes) == ("image", ("cat", "dog"))
    assert sources["train"].labels.tolist() == [0, 1]
    assert (sources["test"].classes, sources["test"].labels.tolist()) == (("cat", "dog"), [1, 0])


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        (
            lambda d, v, i: {"train": hub_columns(names=None, label=(v, [3, 4]))},
            "label has no names of classes",
        ),
        (
            lambda d, v, i: {"train": {k: (i, [Image.new("L", (2, 2))]) for k in ("photo", "mask")}},
            r"several columns of images \(photo, mask\)",
        ),
        (
            lambda d, v, i: {"train": hub_columns(names=None, **dict.fromkeys(("fine", "coarse"), d))},
            r"several columns of classes \(fine, coarse\)",
        ),
        (lambda d, v, i: {"train": hub_columns((0, -1))}, "images of .*-train have no label"),
        (lambda d, v, i: {"train": hub_columns(), "test": hub_columns((-1, 0))}, "images of .*-test have no"),
        (
            lambda d, v, i: {"train": hub_columns(), "test": hub_columns(names=None)},
            "-test has other columns",
        ),
        (
            lambda d, v, i: {"train": hub_columns(), "test": hub_columns(names=("cat", "eel"))},
            "has the class eel, which no training image has",
        ),
        (
            lambda d, v, i: {"one": hub_columns(), "two": hub_columns()},
            "has the splits one, two, none called",
        ),
    ],
    ids=["numbers", "two images", "two labels", "-1", "test -1", "test without", "other class", "no train"],
)
def test_hugging_face_sets_that_can_be_read_in_two_ways(tmp_path, splits, sentence):
    import datasets

    kinds = (datasets.ClassLabel(names=["x", "y"]), [0, 1]), datasets.Value("int64"), datasets.Image()
    with pytest.raises(InputError, match=sentence):
        hub_set(tmp_path, splits(*kinds))
