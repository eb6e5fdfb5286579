"""A tiny VAE, saved to disk, from prepare to evaluate; and what must not be mixed up."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowback import InputError, checkpoint
from flowback.cli import main
from flowback.config import CodecConfig, DataConfig
from flowback.data import decode_pool, prepared_writer
from flowback.data.columns import Column
from flowback.data.load import load_images
from flowback.data.prepared import sample_posterior
from flowback.data.vae import CHUNK, open_codec
from flowback.sampling.image_files import read_png


def save_vae(folder, seed):
    """A random AutoencoderKL: 32x32 images to 4 channels of 16x16."""
    import diffusers

    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"), 0)


@pytest.fixture(scope="module")
def words(photos, vae):
    """Latents and features of the photographs, without --out."""
    encoder = ("--encoder", "efficientnet_lite0", "--encoder-grid", 4)
    words = ("prepare", photos, "--image-size", 32, "--vae", vae, *encoder, "--device", "cpu", "--workers", 0)
    return [str(word) for word in words]


@pytest.fixture
def small_commits(monkeypatch):
    make_commits_small(monkeypatch)


def make_commits_small(monkeypatch):
    monkeypatch.setattr(prepared_writer, "TASK", 8)
    monkeypatch.setattr(decode_pool, "TASK", 8)
    monkeypatch.setattr(prepared_writer, "COMMIT", 1)


@pytest.fixture(scope="module")
def prepared(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "set"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_commits_small(monkeypatch)
        assert main([*words, "--out", str(out)]) == 0
    return out


LATENT = ("--model.channels", 4, "--model.image-size", 16, "--model.noise-std", 0.2)


def test_moments_are_the_vaes_and_their_samples_follow_them(prepared, vae):
    import diffusers

    model = diffusers.AutoencoderKL.from_pretrained(vae).eval()
    latents = load_images(DataConfig(path=prepared), 16, 4, "train")
    images = latents.in_pixels.read(torch.tensor([3])).float() / 127.5 - 1
    stored = latents.read_training(torch.tensor([3]))[0]
    for mirror, own in enumerate((images, images.flip(3))):
        with torch.no_grad():
            expected = model.encode(own).latent_dist
        # float16 keeps 11 bits.
        torch.testing.assert_close(stored[mirror, 0], 0.18215 * expected.mean[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stored[mirror, 1], 0.18215 * expected.std[0], rtol=1e-3, atol=1e-4)
    noise = torch.randn(2, 4, 16, 16)
    both = stored.expand(2, *stored.shape)
    drawn = sample_posterior(both, torch.tensor([False, True]), noise)
    torch.testing.assert_close(drawn[0], stored[0, 0] + stored[0, 1] * noise[0])
    torch.testing.assert_close(drawn[1], stored[1, 0] + stored[1, 1] * noise[1])
    codec = open_codec(latents.codec)
    with torch.no_grad():
        expected = model.decode(drawn / 0.18215).sample
    torch.testing.assert_close(codec.decode(drawn), expected)


WRITES = 6
"""Of a commit: images, labels, names' ends, names, latents, features."""


@pytest.mark.parametrize("write", [4, 2 * WRITES + 5])
def test_killed_it_resumes_to_the_same_bytes(flowback, words, prepared, tmp_path, small_commits, write):
    """SIGKILL after a write, counted from 0: latents of the first commit, and features of the third."""
    out = tmp_path / "set"

    def killed():
        left = itertools.count(write, -1)
        append = Column.append

        def last(column, rows):
            append(column, rows)
            column.file.flush()  # what the system has is there after a kill
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        Column.append = last
        main([*words, "--out", str(out)])

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not (out / "prepared.json").exists()
    code, _, err = flowback(*words, "--out", out)
    assert code == 0, err
    files = {file.relative_to(prepared) for file in prepared.rglob("*") if file.is_file()}
    assert files == {file.relative_to(out) for file in out.rglob("*") if file.is_file()}
    assert {str(file) for file in files} > {"train/latents.npy", "train/features.npy", "test/latents.npy"}
    for file in files:
        assert (out / file).read_bytes() == (prepared / file).read_bytes(), file


def test_prepare_train_sample_decode_evaluate(flowback, small, prepared, vae, tmp_path, caplog):
    out = tmp_path / "run"
    code, _, err = flowback(
        "train", "folder-32-reverse", "--data.path", prepared, "--out", out, *LATENT, *small,
        "--train.sample-every", 4,
    )  # fmt: skip
    assert code == 0, err
    assert f"read from {prepared}/train/features.npy; the encoder is not loaded." in caplog.text
    config = checkpoint.load_config(out)
    assert config.codec.vae == str(vae)
    assert len(config.codec.weights) == 64
    assert (out / "samples/step-00000004.png").is_file()
    moved = tmp_path / "moved"
    shutil.copytree(vae, moved)
    code, _, err = flowback("sample", out, "--out", tmp_path / "drawn", "--count", 3, "--vae", moved)
    assert code == 0, err

    pictures = sorted((tmp_path / "drawn").rglob("*.png"))
    assert [read_png(file)[0].shape for file in pictures] == [(3, 32, 32)] * 3
    code, _, err = flowback("evaluate", out, "--samples", 8, "--draws", 1)
    assert code == 0, err
    figures = json.loads((out / "evaluation/evaluate.json").read_text())["figures"]
    assert {"nll", "top1_gradient", "fd_efficientnet_lite0"} <= set(figures)
    assert "bits_per_dim" not in figures

    other = save_vae(tmp_path / "other", 1)
    words = ("sample", out, "--out", tmp_path / "wrong", "--count", 1, "--vae", other)
    code, _, err = flowback(*words)
    assert code == 2
    assert "is not the VAE of the latents that this model was trained on" in err
    assert not (tmp_path / "wrong").exists()
    assert flowback(*words, "--force-vae")[0] == 0


def test_latents_that_do_not_fit(flowback, small, prepared, tmp_path):
    words = ("train", "folder-32", "--data.path", prepared, "--out", tmp_path / "run", *small)
    code, _, err = flowback(*words)
    assert code == 2
    assert "holds latents of 4 channels and 16x16" in err
    code, _, err = flowback(*words, *LATENT, "--codec.vae", "stabilityai/sd-vae-ft-ema")
    assert code == 2
    assert "The settings ask for latents of --codec.vae stabilityai/sd-vae-ft-ema" in err
    assert not (tmp_path / "run").exists()
    broken = tmp_path / "broken"
    shutil.copytree(prepared, broken)
    latents = np.load(broken / "train/latents.npy")
    latents[:, 0, 0, 2, 3, 4] = np.nan
    np.save(broken / "train/latents.npy", latents)
    code, _, err = flowback(*words, *LATENT, "--data.path", broken)
    assert code == 2
    assert "latents.npy holds values that are not finite" in err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is damaged or incomplete"),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
            "is damaged or incomplete",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}'),
            "holds a UNet2DModel; an AutoencoderKL or AutoencoderTiny is needed",
        ),
    ],
)
def test_a_folder_that_holds_no_vae(flowback, photos, vae, tmp_path, change, sentence):
    shutil.copytree(vae, tmp_path / "vae")
    change(tmp_path / "vae")
    code, _, err = flowback(
        "prepare", photos, "--out", tmp_path / "set", "--image-size", 32, "--vae", tmp_path / "vae"
    )
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "set").exists()


def test_a_tiny_autoencoder_has_no_posterior(tmp_path):
    """AutoencoderTiny: means without uncertainty, decoded again; and its own hash."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    model.save_pretrained(tmp_path / "tiny")
    config = CodecConfig(str(tmp_path / "tiny"), scale=0.7, shift=0.1, image_size=16)
    codec = open_codec(config)
    images = 2 * torch.rand(CHUNK + 1, 3, 16, 16) - 1
    moments = codec.encode(images)
    with torch.no_grad():
        latents = model.encode(images).latents
        decoded = model.decode(latents).sample
    assert latents.shape == (CHUNK + 1, 4, 8, 8)
    # fp32: chunks of 16 and 1 images against one of 17.
    torch.testing.assert_close(moments[:, 0], 0.7 * (latents - 0.1), rtol=1e-5, atol=1e-6)
    assert not moments[:, 1].any()
    torch.testing.assert_close(codec.decode(moments[:, 0]), decoded, rtol=1e-4, atol=1e-5)
    assert open_codec(codec.config).config.weights == codec.config.weights
    with pytest.raises(InputError, match="is not the VAE of the latents"):
        open_codec(replace(codec.config, weights="0" * 64))


def test_pixels_take_no_vae():
    assert torch.equal(open_codec(CodecConfig()).decode(torch.ones(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))


def with_config(vae, folder, **changes):
    """The same weights under another config."""
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prepare_small(flowback, photos, out, vae, *more):
    words = ("--image-size", 16, "--vae", vae, "--device", "cpu", "--workers", 0, "--out", out)
    return flowback("prepare", photos, *words, *more)


def settings_of(out):
    codec = json.loads((out / "prepared.json").read_text())["settings"]["codec"]
    return codec["scale"], codec["shift"]


def test_scale_and_shift_are_the_vaes_own(flowback, photos, vae, tmp_path):
    own = with_config(vae, tmp_path / "own", scaling_factor=1.5305, shift_factor=0.0609)
    code, printed, err = prepare_small(flowback, photos, tmp_path / "set", own)
    assert code == 0, err
    assert settings_of(tmp_path / "set") == (1.5305, 0.0609)
    assert "replaces the VAE's own" not in printed + err
    latents = load_images(DataConfig(path=tmp_path / "set"), 8, 4, "train")
    config = latents.codec
    images = latents.in_pixels.read(torch.tensor([0])).float() / 127.5 - 1
    raw = open_codec(replace(config, scale=1.0, shift=0.0)).encode(images)[0, 0]
    stored = latents.read(torch.tensor([0]))[0]
    torch.testing.assert_close(stored, 1.5305 * (raw - 0.0609), rtol=1e-3, atol=2e-3)  # float16
    # Another config beside the same weights changes nothing for latents that are there.
    assert open_codec(config, vae=str(vae)).scale == 1.5305


def test_options_replace_the_vaes_own_with_a_notice(flowback, photos, vae, tmp_path):
    own = with_config(vae, tmp_path / "own", scaling_factor=1.5305, shift_factor=0.0609)
    words = ("--vae-scale", 2.5, "--vae-shift", 0)
    code, printed, err = prepare_small(flowback, photos, tmp_path / "set", own, *words)
    assert code == 0, err
    assert settings_of(tmp_path / "set") == (2.5, 0.0)
    assert "--vae-scale 2.5 replaces the VAE's own, 1.5305." in printed + err
    assert "--vae-shift 0 replaces the VAE's own, 0.0609." in printed + err


@pytest.mark.parametrize("spread", [0.4, 0.6, 1.9, 2.5])
def test_latents_far_from_unit_scale_are_warned_of(flowback, photos, vae, tmp_path, caplog, spread):
    """Scale the latents to a known standard deviation, as measured with scale 1."""
    assert prepare_small(flowback, photos, tmp_path / "unit", vae, "--vae-scale", 1, "--holdout", 0)[0] == 0
    moments = torch.from_numpy(np.load(tmp_path / "unit/train/latents.npy")).float()[:, 0]
    unit = float((moments[:, 0].var(correction=0) + moments[:, 1].square().mean()).sqrt())
    caplog.clear()
    words = ("--vae-scale", spread / unit, "--holdout", 0)
    assert prepare_small(flowback, photos, tmp_path / "set", vae, *words)[0] == 0
    warned = [record.getMessage() for record in caplog.records if "standard deviation" in record.getMessage()]
    if 0.5 <= spread <= 2:
        assert warned == []
    else:
        (text,) = warned
        assert text.startswith(f"The latents of 48 images have the standard deviation {spread:.3g};")
        assert f"with --vae-scale {1 / unit:.3g}, or choose" in text
