from __future__ import annotations

import builtins
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch.utils.data import Dataset
from torch_fidelity.fidelity import calculate_metrics

from flowback.errors import InputError
from flowback.evaluation import inception
from flowback.evaluation.inception import load_inception, spatial_features
from flowback.evaluation.protocol import InceptionStatistics, adm_figures
from random_inception import random_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_weights(), file)
    return file


def crops(count: int, noise: float = 0.0) -> torch.Tensor:
    """Crops of a photograph, distorted by noise of this many grey levels."""
    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    generator = torch.Generator().manual_seed(7)
    place = [torch.randint(0, side - 64, (count,), generator=generator).tolist() for side in photo.shape[1:]]
    pixels = torch.stack([photo[:, y : y + 64, x : x + 64] for y, x in zip(*place, strict=True)]).float()
    noised = pixels + noise * torch.randn(pixels.shape, generator=generator)
    return noised.round().clamp(0, 255).byte()


def test_spatial_features_of_a_hand_made_map():
    # Value 10000·row + 100·column + channel: the order row, column, channel can be read off.
    row, column, channel = torch.meshgrid(
        torch.arange(17), torch.arange(17), torch.arange(192), indexing="ij"
    )
    branch = (10000 * row + 100 * column + channel).permute(2, 0, 1)[None].double()
    features = spatial_features(branch)[0]
    assert features.shape == (2023,)
    assert features[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 100]
    assert features[17 * 7].item() == 10000
    assert features[-1].item() == 160000 + 1600 + 6


class Pictures(Dataset):
    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def test_figures_are_torch_fidelitys_on_real_and_distorted_images(weights):
    # A few crops: enough for every formula at work; benchmarks/evaluation.py does it with thousands.
    real, distorted = crops(6), crops(10, noise=20)
    theirs = calculate_metrics(
        input1=Pictures(distorted), input2=Pictures(real), cuda=False, verbose=False, cache=False,
        batch_size=10, save_cpu_ram=True, isc=True, prc=True, samples_shuffle=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    inception = load_inception(weights)
    inputs: list[torch.Tensor] = []  # of mixed_6
    hook = inception.network.Mixed_6c.register_forward_hook(lambda *seen: inputs.append(seen[2].clone()))
    sets = []
    for pixels in (distorted, real):
        made = InceptionStatistics(inception, len(pixels), scores=len(pixels) >= 10, rows=100)
        for batch in pixels.split(5):
            made.add(batch)
        sets.append(made)
    hook.remove()
    ours = adm_figures(*sets)
    # Their FID takes ten seconds for eigenvalues of a general 2048 × 2048 matrix: see test_scores.
    assert ours["fid"] == pytest.approx(frechet_of_few(*(made.rows.numpy() for made in sets)), rel=1e-4)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-4)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-4)
    branches = []
    for x in (torch.cat(inputs[:2]), torch.cat(inputs[2:])):
        block = inception.network.Mixed_6d.branch1x1
        y = torch.relu(block.bn(block.conv(x)))
        assert y.shape[1:] == (192, 17, 17)
        rows = [y[:, c, i, j] for i in range(17) for j in range(17) for c in range(7)]
        branches.append(torch.stack(rows, dim=1).numpy())
    assert ours["sfid"] == pytest.approx(frechet_of_few(*branches), rel=1e-4)


def frechet_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of few rows: tr (Σ₁Σ₂)^½ is the nuclear norm of A·Bᵀ, with A, B the centred rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    gap = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(gap @ gap + (a**2).sum() + (b**2).sum() - 2 * cross)


def test_grey_images_are_three_equal_channels(weights):
    network = load_inception(weights)
    assert not network.published  # random, which the figures' report says
    grey = crops(2)[:, :1, :32, :32]
    one, three = network(grey), network(grey.repeat(1, 3, 1, 1))
    assert torch.equal(one.pool, three.pool)
    assert one.spatial.shape == (2, 2023)
    assert one.logits.shape == (2, 1008)
    assert not any(module._forward_hooks for module in network.modules())  # nothing is left behind


def test_the_published_file_is_known_by_its_hash(tmp_path):
    """PyTorch's hub writes the first digits of a file's SHA-256 into its name."""
    file = tmp_path / "renamed.pth"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert inception._is_published(file, f"https://example.org/weights-2015-12-05-{digest[:8]}.pth")
    assert not inception._is_published(file, "https://example.org/weights-2015-12-05-6726825d.pth")


def test_weights_of_another_network_are_refused(tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(InputError, match="does not hold the weights of the 2015-12-05 Inception"):
        load_inception(file)


def test_weights_that_carry_code_are_refused(tmp_path):
    file = tmp_path / "code.pth"
    file.write_bytes(pickle.dumps({"fc.weight": print}))
    with pytest.raises(InputError, match="is not a file of tensors"):
        load_inception(file)


def test_missing_weights_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be read"):
        load_inception(tmp_path / "missing.pth")

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=r"no route to host.*--inception-weights FILE"):
        load_inception()


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("torch_fidelity"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"flowback-nf\[fid\]"):
        load_inception()
