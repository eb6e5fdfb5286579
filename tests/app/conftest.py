import pytest
import torch

from flowback import Flow, ModelConfig

CONFIG = ModelConfig(
    image_size=8, channels=1, patch_size=2, width=16, blocks=2, layers=1, head_dim=8, num_classes=3
)
CLASSES = ("cat", "dog", "eel")


def made(seed=0, classes=CLASSES):
    torch.manual_seed(seed)
    flow = Flow(CONFIG, classes).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


@pytest.fixture(scope="session")
def flow():
    return made()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A run with two checkpoints, and one with another."""
    folder = tmp_path_factory.mktemp("secret-place")
    made(1).save_pretrained(folder / "first" / "checkpoints" / "step-00000010")
    made(2).save_pretrained(folder / "first" / "checkpoints" / "step-00000020")
    made(3).save_pretrained(folder / "second" / "checkpoints" / "step-00000005")
    return folder
