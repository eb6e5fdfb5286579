"""Files made to do harm: what each asks for is refused, or does not matter, before any of it is believed."""

import contextlib
import gzip
import io
import json
import os
import stat
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowback import DataConfig, Flow, InputError, RunConfig, checkpoint, files
from flowback.alignment import targets
from flowback.alignment.encoders import Encoder, Recipe
from flowback.checked import to_dict
from flowback.config import AlignmentConfig, ModelConfig, TrainConfig
from flowback.data import pixels as pixels_module
from flowback.data import vae
from flowback.data.hf_datasets import HubSource
from flowback.data.image_folder import list_images, load_folder
from flowback.data.mnist import downloads, read_idx
from flowback.data.pixels import UnreadableImageError, read_image
from flowback.data.shards import open_shards
from flowback.evaluation import npz
from flowback.evaluation.protocol import kept
from flowback.evaluation.references import load_reference, open_images
from flowback.sampling.guidance import Guidance
from flowback.sampling.image_files import read_png
from flowback.sampling.sampler import seeds_of
from flowback.tarflow_weights import from_tarflow
from flowback.task_config import SampleConfig
from flowback.training.run_folder import RunFolder
from fuzzing import little_room, png_header

MODEL = ModelConfig(
    image_size=4, channels=1, patch_size=2, width=8, blocks=1, layers=1, head_dim=8, num_classes=2
)
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def refused(call, *arguments):
    """The one sentence of a refusal, which takes no memory to speak of."""
    with little_room(), pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "saved", RunConfig(model=MODEL), Flow(MODEL).state_dict())
    return tmp_path / "saved"


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# --- checkpoints ---


@pytest.mark.parametrize(
    ("section", "option", "value", "sentence"),
    [
        ("model", "blocks", 10**9, "--model.blocks is 1e+09, and flowback takes at most 1024"),
        ("model", "blocks", 1000, "do not fit its config.json: they are"),
        ("model", "layers", 10**30, "--model.layers is 1e+30"),
        ("model", "num_classes", 10**9, "--model.num-classes is above"),
        ("model", "image_size", 2000, "gives 1000000 tokens, and flowback takes at most 65536"),
        ("train", "timeout", 1e300, "--train.timeout must be above 0, and at most"),
    ],
)
def test_settings_that_ask_for_too_much(saved, section, option, value, sentence):
    settings = json.loads((saved / "config.json").read_text())
    settings[section][option] = value
    (saved / "config.json").write_text(json.dumps(settings))
    assert sentence in refused(Flow.from_pretrained, saved)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *(({"format": value}, "has no format number") for value in (0, -5, True, "1", 1.0, None)),
        *(({"sha256": value}, "sha256 is no list of checksums") for value in ([1], "x", {"config.json": 3})),
    ],
)
def test_formats_and_checksums_of_no_kind(saved, change, sentence):
    settings = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**settings, **change}))
    assert sentence in refused(checkpoint.load_config, saved)


def test_weights_that_are_no_weights(saved):
    from safetensors.torch import save

    settings = {"format": 1, **to_dict(RunConfig(model=MODEL))}
    (saved / "config.json").write_text(json.dumps(settings))
    whole = Flow(MODEL).state_dict()
    for change in (lambda v: v.long(), lambda v: v.double() if v.ndim == 1 else v):
        (saved / "model.safetensors").write_bytes(save({k: change(v) for k, v in whole.items()}))
        assert "not weights of one floating-point type" in refused(Flow.from_pretrained, saved)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "blocks.999999999.attn_blocks.0.x",
            "it names 1000000000 blocks of 1 layers, but holds only 2 tensors",
        ),
        ("blocks.0.attn_blocks.999999999.x", "it names 1 blocks of 1000000000 layers, but holds only"),
        ("blocks.2000000000.attn_blocks.0.x", "it lacks var and 18 more"),  # no number of any block
    ],
)
def test_names_that_count_to_a_billion(name, sentence):
    state = {"blocks.0.attn_blocks.0.x": torch.ones(1), name: torch.ones(1)}
    assert sentence in refused(from_tarflow, state, 4, 2)


def test_files_follow_the_umask(tmp_path):
    for mask, expected in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        with umask(mask):
            folder = tmp_path / str(mask)
            checkpoint.save(folder, RunConfig(model=MODEL), Flow(MODEL).state_dict(), {"step": 1})
            files.write_json(folder / "more.json", {})
        assert {mode(file) for file in folder.iterdir()} == {expected}


def test_a_linked_step_is_left_alone(tmp_path):
    config = RunConfig(model=MODEL, train=TrainConfig(keep_last=1))
    weights = Flow(MODEL).state_dict()
    steps = tmp_path / "run" / "checkpoints"
    checkpoint.save(tmp_path / "mine", config, weights)
    steps.mkdir(parents=True)
    (steps / "step-00000001").symlink_to(tmp_path / "mine")
    for step in (2, 3):
        checkpoint.save(steps / f"step-{step:08d}", config, weights)
    (steps / "step-٠٠٠٠٠٠٠٩").mkdir()  # digits, too, to some
    RunFolder(tmp_path / "run", config).remove_old()
    assert [folder.name for folder in checkpoint.step_folders(tmp_path / "run")] == [
        "step-00000001",
        "step-00000003",
    ]
    assert (tmp_path / "mine" / "model.safetensors").is_file()


# --- .npz ---


def header(shape, dtype="|u1"):
    """What stands before an array of that shape."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
@pytest.mark.parametrize("shape", [(10**9, 8, 8, 3), (5, 8, 8, 3), (3, 8, 8, 3), (-4, 8, 8, 3)])
def test_an_array_is_as_long_as_its_entry(tmp_path, packed, shape):
    """One that is longer would take its last images from the entry that follows."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("arr_0.npy", header(shape) + PIXELS.tobytes())
        archive.writestr("arr_1.npy", header((10**6,)) + bytes(10**6))
    for read in (open_images, lambda path: load_reference(path, 8, 3)):
        assert "arr_0.npy has another size than its header says" in refused(read, path)


def test_a_compressed_array_has_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header((4, 8, 8, 3)) + PIXELS.tobytes())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        true = archive.getinfo("arr_0.npy").file_size
    path.write_bytes(content.replace(true.to_bytes(4, "little"), (2**32 - 2).to_bytes(4, "little")))
    assert "another size than its header" in refused(open_images, path)
    monkeypatch.setattr(npz, "LIMIT", 4 * 8 * 8 * 3)
    assert "compressed arrays of more than" in refused(open_images, path)


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / "a.npz"
    pixels = np.tile(PIXELS, (32, 1, 1, 1))  # more than zipfile reads for the header
    np.savez(path, pixels)
    content = bytearray(path.read_bytes())
    content[content.index(pixels.tobytes()) + 20_000] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32" in refused(open_images, path)


# --- images and folders ---


BOMB = png_header(60_000, 60_000)


@pytest.fixture
def messy(tmp_path):
    """Two good pictures among all that a folder can hold."""
    folder = tmp_path / "messy"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(PIXELS[0]).save(folder / name)
    Image.fromarray(PIXELS[0]).save(os.fsencode(folder) + b"/caf\xe9.png", format="PNG")
    Image.fromarray(PIXELS[0]).save(folder / "two\nlines.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("missing")
    (folder / "bomb.png").write_bytes(BOMB)
    (folder / "round").symlink_to(".")
    return folder


BAD = {
    "bomb.png (too many pixels)",
    r"caf\udce9.png (its name is not UTF-8)",
    "gone.png (no such file)",
    "loop.png (damaged: Too many levels of symbolic links)",
    "pipe.png (not a file)",
}


def test_a_messy_folder(messy):
    sentence = refused(load_folder, DataConfig("folder", messy, holdout=0.0), 8, 3, "train")
    assert sentence.startswith("5 of the 8 images in ")
    images = load_folder(DataConfig("folder", messy, holdout=0.0, bad_images="skip"), 8, 3, "train")
    assert set(images.skipped) == BAD
    assert [images.file_name(index) for index in range(3)] == ["a.png", "b.png", r"two\nlines.png"]
    assert refused(open_images, messy).startswith("5 of the 8 images in ")


def test_a_class_has_a_name_that_is_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Image.fromarray(PIXELS[0]).save(folder + b"/a.png", format="PNG")
    assert r"holds the folder caf\udce9, whose name is not UTF-8" in refused(list_images, tmp_path)


def test_folders_deep_inside_one_another(tmp_path):
    place = tmp_path
    for _ in range(110):
        place = place / "d"
    place.mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save(place / "a.png")
    assert "at most 100 folders deep" in refused(list_images, tmp_path)


def test_alpha_in_strips_is_alpha_at_once():
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (300, 4000, 4), dtype=np.uint8))
    at_once = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(pixels_module._over_white(image)), np.asarray(at_once))


def test_an_image_has_a_limit_of_pixels(monkeypatch):
    stream = io.BytesIO()
    Image.new("1", (64, 64)).save(stream, format="PNG")
    assert read_image(stream.getvalue(), 8, 3)[0].max() == 0
    monkeypatch.setattr(pixels_module, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        read_image(stream.getvalue(), 8, 3)


# --- shards, idx files, columns ---


def tar(*members, form=tarfile.GNU_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return bytearray(stream.getvalue())


def with_header(content, at, field):
    """The tar file with other bytes in its first header, whose checksum is brought up to date."""
    content[at : at + len(field)] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return content


def test_members_of_hostile_shards(tmp_path):
    path, png = tmp_path / "a.tar", b"x" * 600
    negative = (-1024).to_bytes(12, "big", signed=True)
    huge = b"\x80" + (2**60).to_bytes(11, "big")
    for content, sentence in (
        (with_header(tar(("a.png", png), ("b.png", png)), 124, negative), "damaged|negative|size"),
        (with_header(tar(("a.png", png), ("b.png", png)), 124, huge), "size|end of data"),
        (with_header(tar(("a.png", png)), 156, b"S"), "sparse"),
        (tar(*[("x" * 200 + f"{n}", b"") for n in range(2)])[:1024] * 3000, "cut short"),
        (tar(("a.png", png), ("a.cls", b"1" * (2**20 + 1))), "too long for a label"),
        (tar(("a.png", png), ("a.json", b"[" * 100_000)), "holds no number"),
        (tar(("a.png", png), ("a.cls", b"1.5")), "holds the label 1.5"),
    ):
        path.write_bytes(content)
        message = refused(open_shards, path, 0.0)
        assert any(part in message for part in sentence.split("|")), message


def test_an_idx_file_does_not_grow_without_end(tmp_path, monkeypatch):
    from flowback.data import mnist

    monkeypatch.setattr(mnist, "LIMIT", 2**20)
    whole = bytes((0, 0, 8, 1)) + (2**24).to_bytes(4, "big") + bytes(2**24)
    (tmp_path / "a.gz").write_bytes(gzip.compress(whole))
    tracemalloc.start()
    assert "holds more than 1 MiB" in refused(read_idx, tmp_path / "a.gz", 1)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    (tmp_path / "none").write_bytes(bytes((0, 0, 8, 3)) + (0).to_bytes(4, "big") * 3)
    assert "holds nothing" in refused(read_idx, tmp_path / "none", 3)


def test_rows_without_an_image():
    rows = [
        {"image": {"bytes": b"x", "path": None}},
        {"image": None},
        {"image": {"bytes": None, "path": None}},
    ]
    source = HubSource("set", rows, "image", (), None)
    assert source.open(0) == b"x"
    for row in (1, 2):
        with pytest.raises(UnreadableImageError, match="no image in this row"):
            source.open(row)


@pytest.mark.parametrize(("option", "value"), [("layers_per_block", 10**9), ("block_out_channels", [10**9])])
def test_a_vae_of_a_size(option, value):
    vae._check_sizes("v", {"sample_size": 512, "layers_per_block": 2, "block_out_channels": [128, 256]})
    assert f"with {option} above" in refused(vae._check_sizes, "v", {option: value})


def test_a_sample_that_is_damaged(tmp_path):
    (tmp_path / "000000.png").write_bytes(BOMB)
    assert "000000.png is damaged" in refused(read_png, tmp_path / "000000.png")


# --- the cache ---


@pytest.fixture
def no_cache_folder(tmp_path, monkeypatch):
    """A file where the cache should be: nothing can be kept, whoever asks."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "file"))
    files._say_no_cache.cache_clear()


def test_without_a_cache_statistics_are_computed(no_cache_folder, caplog):
    right = {"mean": torch.arange(3.0)}
    for _ in range(2):
        assert kept(("key",), lambda: right) is right
    assert caplog.text.count("The cache cannot be used") == 1


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("FLOWBACK_CACHE")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files.Path, "home", nobody)
    with pytest.raises(OSError, match="no home folder; set FLOWBACK_CACHE"):
        files.cache_folder()
    assert "give --data.path" in refused(downloads, "mnist")
    assert kept(("key",), lambda: {"a": torch.ones(1)})["a"] == 1


def test_without_a_cache_the_encoder_runs_at_every_step(no_cache_folder, digits, monkeypatch, caplog):
    stub = Encoder("stub", torch.nn.Identity(), Recipe(4, 4, (0.5,) * 3, (0.5,) * 3))  # it is not asked
    monkeypatch.setattr(targets, "create_encoder", lambda *_: stub)
    config = RunConfig(
        model=ModelConfig(image_size=8, channels=1, patch_size=2, width=8, blocks=1, layers=1, head_dim=8),
        alignment=AlignmentConfig(strategy="detach", locations=((1, 1),)),
    )
    assert isinstance(targets.make_targets(config, digits), targets.ComputedTargets)
    assert caplog.text.count("The cache cannot be used") == 1


# --- values in Python ---


def test_values_that_gave_nan_or_another_image():
    flow = Flow(MODEL)
    assert "not all finite" in refused(flow.labels, torch.tensor([[float("nan"), 1.0]]), 1)
    assert "whole numbers" in refused(seeds_of, None, torch.tensor([1.7]))
    assert "at least -1" in refused(lambda: Guidance(-3.0, formula="starflow"))
    assert "at least -1" in refused(lambda: SampleConfig(guidance=-3, formula="starflow"))
    assert Guidance(-3.0).active
    assert Guidance(-1.0, formula="starflow").active
