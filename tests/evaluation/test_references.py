from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flowback.data.decode_pool import Settings
from flowback.data.prepared_writer import prepare
from flowback.data.sources import open_source
from flowback.errors import InputError
from flowback.evaluation.references import load_reference, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
MEAN, COVARIANCE = np.arange(3.0), np.eye(3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_images(tmp_path, save):
    path = tmp_path / "reference.npz"
    save(path, PIXELS)
    images = open_images(path)
    assert len(images) == 7
    assert isinstance(images.pixels, np.memmap) == (save is np.savez)  # not read into memory
    assert torch.equal(
        images.read(torch.tensor([2, 5])), torch.from_numpy(PIXELS[[2, 5]]).permute(0, 3, 1, 2)
    )
    assert images.file_name(3) == "reference.npz[3]"
    reference = load_reference(path, 16, 3)
    assert reference.images is not None
    assert reference.pool is reference.spatial is None


def test_npz_of_statistics_and_images(tmp_path):
    path = tmp_path / "adm.npz"
    np.savez(path, PIXELS, mu=MEAN, sigma=COVARIANCE, mu_s=MEAN + 1, sigma_s=2 * COVARIANCE)
    reference = load_reference(path, 16, 3)
    assert len(reference.images) == 7
    assert reference.pool.mean.tolist() == [0, 1, 2]
    assert torch.equal(reference.spatial.covariance, 2 * torch.eye(3, dtype=torch.float64))
    np.savez(tmp_path / "only.npz", mu=MEAN, sigma=COVARIANCE)
    only = load_reference(tmp_path / "only.npz", 16, 3)
    assert only.images is only.spatial is None
    assert only.fingerprint != reference.fingerprint


def test_the_fingerprint_follows_the_images(tmp_path):
    changed = PIXELS.copy()
    changed[6, 0, 0, 0] ^= 1
    for name, pixels in (("a", PIXELS), ("b", PIXELS), ("c", changed)):
        np.savez(tmp_path / f"{name}.npz", pixels)
    a, b, c = (open_images(tmp_path / f"{name}.npz").fingerprint for name in "abc")
    assert a == b != c


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "code.npz"
    np.savez(path, np.array([print], dtype=object))
    for load in (open_images, lambda p: load_reference(p, 16, 3)):
        with pytest.raises(InputError, match="pickled objects"):
            load(path)


def test_bad_npz(tmp_path):
    def saved(**arrays):
        np.savez(tmp_path / "bad.npz", **arrays)
        return tmp_path / "bad.npz"

    with pytest.raises(InputError, match="16x16, but the samples are 32x32"):
        load_reference(saved(arr_0=PIXELS), 32, 3)
    with pytest.raises(InputError, match="arr_0 is float64"):
        load_reference(saved(arr_0=PIXELS / 255), 16, 3)
    with pytest.raises(InputError, match="neither images"):
        load_reference(saved(arr_1=PIXELS), 16, 3)
    with pytest.raises(InputError, match="holds no images"):
        open_images(saved(mu=MEAN, sigma=COVARIANCE))
    with pytest.raises(InputError, match="not a mean and its covariance"):
        load_reference(saved(mu=MEAN, sigma=COVARIANCE[:2]), 16, 3)
    with pytest.raises(InputError, match="not a mean and its covariance"):
        load_reference(saved(mu=MEAN * np.nan, sigma=COVARIANCE), 16, 3)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"pickled objects|no \.npz"):
        open_images(tmp_path / "text.npz")
    with pytest.raises(InputError, match="does not exist"):
        open_images(tmp_path / "missing.npz")
    path = saved(arr_0=PIXELS)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"no \.npz"):
        open_images(path)


def test_folders(tmp_path):
    photos = tmp_path / "photos"
    for name, width in (("a", 24), ("b", 30)):
        (photos / name).mkdir(parents=True)
        for index in range(9):
            pixels = np.random.default_rng(index).integers(0, 256, (20, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / name / f"{index}.png")
    reference = load_reference(photos, 16, 3)
    assert len(reference.images) == 18  # all of them: nothing is held out
    assert reference.images.read(torch.tensor([0])).shape == (1, 3, 16, 16)
    with pytest.raises(InputError, match=r"not squares of one size \(a/0\.png 24x20, b/0\.png 30x20\)"):
        open_images(photos)
    samples = tmp_path / "samples"
    samples.mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(samples / f"{index:06d}.png")
    images = open_images(samples)
    assert torch.equal(images.read(torch.arange(7)), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    Image.fromarray(PIXELS[0][:8, :8]).save(samples / "zz.png")
    with pytest.raises(InputError, match=r"000000\.png 16x16, zz\.png 8x8"):
        open_images(samples)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no images"):
        open_images(tmp_path / "empty")
    with pytest.raises(InputError, match="neither a checkpoint, nor"):
        open_images(tmp_path / "nowhere")


def messy(folder):
    """Four grey pictures, and what systems and broken copies leave beside them."""
    folder.mkdir()
    for index in range(4):
        Image.fromarray(PIXELS[index, :, :, 0]).save(folder / f"{index}.png")
    (folder / "__MACOSX").mkdir()
    for junk in ("__MACOSX/0.png", ".hidden.png", "._0.png", "Thumbs.db"):
        (folder / junk).write_bytes(b"no picture")
    return folder


def test_a_folder_is_read_as_training_reads_it(tmp_path):
    folder = messy(tmp_path / "messy")
    assert len(open_images(folder)) == len(load_reference(folder, 16, 1).images) == 4
    (folder / "4.png").write_bytes(b"no picture")
    for read in (open_images, lambda path: load_reference(path, 16, 1)):
        with pytest.raises(InputError, match=r"1 of the 5 images in .*4\.png .*--data\.bad-images skip"):
            read(folder)
    assert len(open_images(folder, "skip")) == len(load_reference(folder, 16, 3, "skip").images) == 4
    for file in folder.glob("[0-3].png"):
        file.unlink()
    with pytest.raises(InputError, match=r"None of the images in .* can be read"):
        open_images(folder, "skip")


def test_grey_prepared_sets_serve_as_both_sides(tmp_path):
    settings = Settings(16, 1, "adm", 0.0, None, None, None)
    folder = messy(tmp_path / "messy")
    prepare(open_source(str(folder), 16, 1, 0.0), tmp_path / "grey", "messy", settings, workers=0)
    samples = open_images(folder)
    reference = load_reference(tmp_path / "grey", 16, samples.read(torch.tensor([0])).shape[1])
    assert torch.equal(
        reference.images.read(torch.arange(4)).expand(-1, 3, -1, -1), samples.read(torch.arange(4))
    )
    assert len(open_images(tmp_path / "grey")) == 4
