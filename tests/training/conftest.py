import pytest
import torch

from flowback.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from flowback.data.images import load_images


@pytest.fixture
def config():
    """A run of a few seconds: 12 steps, a save and a look every 4."""
    return RunConfig(
        model=ModelConfig(
            image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=10
        ),
        data=DataConfig(flip=True),
        train=TrainConfig(
            steps=12,
            batch_size=16,
            lr=1e-2,
            warmup_steps=3,
            ema_decay=0.9,
            log_every=4,
            eval_every=4,
            save_every=4,
            device="cpu",
        ),
    )


@pytest.fixture(scope="session")
def digits():
    return load_images(DataConfig(), 8, 1, "train")


class RandomTargets:
    """Features that depend on the image only."""

    dim = 6
    originals = None

    def __call__(self, indices, flipped, seen):
        tokens = seen.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(seen), 4, 16)
        generator = torch.Generator().manual_seed(0)
        return torch.tanh(tokens @ torch.randn(16, self.dim, generator=generator))


@pytest.fixture
def targets():
    return RandomTargets()
