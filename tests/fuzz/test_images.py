"""Spoiled images and sets of images."""

import gzip
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from flowback import DataConfig, InputError, load_images
from flowback.data.decode_pool import Settings
from flowback.data.image_folder import load_folder
from flowback.data.mnist import read_idx
from flowback.data.pixels import UnreadableImageError, picture_size, read_image
from flowback.data.prepared import load_prepared
from flowback.data.prepared_writer import prepare
from flowback.data.shards import open_shards
from flowback.data.sources import open_source
from flowback.evaluation.protocol import kept
from flowback.evaluation.references import load_reference, open_images
from fuzzing import fuzz, odd_json, outcome, png_header, spoiled

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def written(save, *arguments, **options):
    """What a function writes into a stream."""
    stream = io.BytesIO()
    save(stream, *arguments, **options)
    return stream.getvalue()


def pictures():
    """A small image in every format and some modes."""
    colour = Image.fromarray(PIXELS[0])
    for ending, modes in {
        **{"PNG": ("RGB", "RGBA", "P", "L", "I;16"), "JPEG": ("RGB", "CMYK"), "BMP": ("RGB",), "GIF": ("P",)},
        **{"WEBP": ("RGBA",), "TIFF": ("RGB", "I;16"), "PPM": ("L",), "TGA": ("RGB",), "JPEG2000": ("RGB",)},
    }.items():
        for mode in modes:
            image = colour.convert("I").convert(mode) if mode == "I;16" else colour.convert(mode)
            yield written(image.save, format=ending)
    yield written(colour.save, format="GIF", save_all=True, append_images=[colour.rotate(90)])


@fuzz(spoiled(list(pictures())))
def test_bytes_of_images(content):
    def read(source):
        try:
            pixels, _ = read_image(source, 4, 3)
            width, height = picture_size(source)
        except UnreadableImageError as error:
            raise InputError(str(error)) from None
        assert (pixels.shape, pixels.dtype) == ((3, 4, 4), np.uint8)
        assert width * height <= 2**27

    outcome(read, content)


def entry(kind, path):
    """Something that lies in a folder."""
    if kind == "picture":
        Image.fromarray(PIXELS[0]).save(path, format="PNG")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("missing")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
        Image.fromarray(PIXELS[1]).save(path / "in.png")
    elif kind == "around":
        path.symlink_to(".")
    elif kind == "bomb":
        path.write_bytes(BOMB)


BOMB = png_header(60_000, 60_000)
KINDS = ["picture", "pipe", "loop", "nowhere", "empty", "folder", "around", "bomb"]
NAMES = [
    b"a.png",
    b"b.PNG",
    b"caf\xe9.png",
    b"two\nlines.png",
    b".hidden.png",
    b"__MACOSX",
    b"class",
    b"\xff",
    b"x.txt",
]


@fuzz(
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS), max_size=5),
    st.sampled_from(["refuse", "skip"]),
)
def test_entries_of_folders(folder, entries, bad_images):
    shutil.rmtree(folder / "set", ignore_errors=True)
    (folder / "set").mkdir()
    for name, kind in entries.items():
        entry(kind, folder / "set" / os.fsdecode(name))
    images = outcome(
        load_folder, DataConfig("folder", folder / "set", bad_images=bad_images, holdout=0.0), 4, 3, "train"
    )
    if images is not None:
        assert len(images) >= 1
        assert images.read(torch.arange(len(images))).shape[1:] == (3, 4, 4)
        json.dumps(images.skipped).encode()
        assert all(images.file_name(index).isprintable() for index in range(len(images)))
        assert bad_images == "skip" or not images.skipped
    samples = outcome(open_images, folder / "set")
    assert samples is None or images is not None


def shard(names):
    """A tar file with these members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


PICTURE = written(Image.fromarray(PIXELS[0]).save, format="PNG")
SHARDS = [
    shard({"0.png": PICTURE, "0.cls": b"1", "1.png": PICTURE, "1.cls": b"0"}),
    shard({"0.png": PICTURE, "0.json": b'{"label": 2}', "a/1.png": PICTURE, "a/1.json": b'{"label": 0}'}),
    shard({f"{'deep/' * 60}{n}.png": PICTURE for n in range(3)}),
]


@fuzz(spoiled(SHARDS))
def test_bytes_of_shards(folder, content):
    (folder / "a.tar").write_bytes(content)
    splits = outcome(open_shards, folder / "a.tar", 0.0)
    if splits is None:
        return
    source = splits["train"]
    assert source.labels is None or 0 <= int(source.labels.min()) <= int(source.labels.max()) < len(
        source.classes
    )
    for index in range(len(source)):
        source.file_name(index).encode()
        assert len(source.open(index)) <= len(content)


def idx(values):
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


WHOLE = idx(PIXELS[..., 0])


@fuzz(
    spoiled([WHOLE, WHOLE, gzip.compress(WHOLE, mtime=0), gzip.compress(WHOLE[:16] + bytes(10**7), mtime=0)])
)
def test_bytes_of_idx_files(folder, content):
    (folder / "idx").write_bytes(content)
    values = outcome(read_idx, folder / "idx", 3)
    assert values is None or values.nbytes + 16 == len(content) or content[:2] == b"\x1f\x8b"


@pytest.fixture(scope="module")
def photos(folder):
    (folder / "photos").mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    return folder / "photos"


TABLE = b'name,class\n0.png,golden retriever\n1,cat\n2.png,"a, b"\n3.png,cat\n'


@fuzz(
    spoiled([TABLE, b"\xef\xbb\xbf" + TABLE, TABLE.replace(b"\n", b"\r\n"), TABLE.decode().encode("utf-16")])
)
def test_bytes_of_label_files(folder, photos, content):
    (folder / "labels.csv").write_bytes(content)
    splits = outcome(lambda: open_source(str(photos), 8, 3, 0.0, folder / "labels.csv"))
    if splits is not None:
        labels = splits["train"].labels
        assert len(labels) == 4
        assert 0 <= int(labels.min()) <= int(labels.max()) < len(splits["train"].classes)


STATISTICS = {"mu": np.arange(3.0), "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": 2 * np.eye(2)}
NPZ = [
    written(np.savez, PIXELS, **STATISTICS),
    written(np.savez_compressed, PIXELS, **STATISTICS),
    written(np.savez, **{name: values.astype(np.float32) for name, values in STATISTICS.items()}),
]


@fuzz(spoiled(NPZ))
def test_bytes_of_npz_files(folder, content):
    """Each array has a checksum: what comes out is what was written."""
    (folder / "reference.npz").write_bytes(content)
    reference = outcome(load_reference, folder / "reference.npz", 8, 3)
    if reference is None:
        return
    if reference.images is not None:
        assert np.array_equal(reference.images.pixels, PIXELS)
    for moments, name in ((reference.pool, ""), (reference.spatial, "_s")):
        if moments is not None:
            assert np.array_equal(moments.mean.numpy(), STATISTICS[f"mu{name}"])
            assert np.array_equal(moments.covariance.numpy(), STATISTICS[f"sigma{name}"])


ARRAYS = [
    *(np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 4, 3), np.uint8), PIXELS.T),
    *(np.zeros(3), np.array(1.0), np.array([["a"]]), np.array([1j]), np.full((3, 3), np.nan), -np.eye(3)),
    *(
        np.zeros((2, 2), "V7"),
        np.array([print], dtype=object),
        np.asfortranarray(PIXELS),
        np.eye(3)[::-1] + 1,
    ),
    np.arange(9.0).reshape(3, 3),
]


@fuzz(
    st.dictionaries(
        st.sampled_from(["arr_0", "mu", "sigma", "mu_s", "a\nb"]), st.integers(0, len(ARRAYS) - 1)
    )
)
def test_arrays_of_npz_files(folder, chosen):
    np.savez(folder / "odd.npz", **{name: ARRAYS[number] for name, number in chosen.items()})
    reference = outcome(load_reference, folder / "odd.npz", 8, 3)
    if reference is not None and reference.pool is not None:
        covariance = reference.pool.covariance
        assert torch.equal(covariance, covariance.T)
        assert bool((covariance.diagonal() >= 0).all())


@fuzz(spoiled([b"", b"x" * 100]), st.booleans())
def test_bytes_of_kept_statistics(folder, content, cut):
    """Whatever the cache holds, what comes out is what was computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBACK_CACHE", str(folder / "cache"))
        right = {"mean": torch.arange(3.0), "count": torch.tensor(5)}
        kept(("key",), lambda: right)
        (file,) = (folder / "cache" / "statistics").iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[: len(content) % len(whole)] if cut else content)
        again = outcome(kept, ("key",), lambda: right)
        assert all(torch.equal(again[name], value) for name, value in right.items())


@pytest.fixture(scope="module")
def prepared(folder, photos):
    source = open_source(str(photos), 8, 3, 0.25)
    prepare(source, folder / "prepared", str(photos), Settings(8, 3, "bicubic", 0.25))
    return folder / "prepared"


def read_prepared(path):
    images = load_prepared(path, 8, 3, "train")
    names = [images.file_name(index) for index in range(len(images))]
    return images.read(torch.arange(len(images))), names, images.labels


FILES = ["images.npy", "labels.npy", "ends.npy", "names.txt"]


@fuzz(st.data(), st.sampled_from(FILES))
def test_bytes_of_prepared_sets(prepared, folder, data, name):
    shutil.rmtree(folder / "copy", ignore_errors=True)
    shutil.copytree(prepared, folder / "copy")
    file = folder / "copy" / "train" / name
    file.write_bytes(data.draw(spoiled([file.read_bytes()])))
    read = outcome(read_prepared, folder / "copy")
    if read is not None:
        pixels, names, labels = read
        assert pixels.shape[1:] == (3, 8, 8)
        assert len(names) == len(pixels)
        assert labels is None


@fuzz(st.data())
def test_summaries_of_prepared_sets(prepared, folder, data):
    whole = json.loads((prepared / "prepared.json").read_text())
    file = folder / "odd" / "prepared.json"
    if not file.parent.exists():
        shutil.copytree(prepared, file.parent)
    file.write_text(json.dumps(data.draw(odd_json(whole))))
    read = outcome(read_prepared, file.parent)
    assert read is None or len(read[0]) == whole["splits"]["train"]["images"]
    again = outcome(load_images, DataConfig(path=file.parent), 8, 3, "test")
    assert again is None or len(again) in {split["images"] for split in whole["splits"].values()}
