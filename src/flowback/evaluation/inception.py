"""The Inception network of published FIDs (2015-12-05), as torch-fidelity carries it.

From one pass over uint8 images, resized to 299 × 299 the way TensorFlow 1 does:

    pool     pool_3, 2048 numbers                                    FID, precision, recall
    spatial  first 7 channels of mixed_6's 1 × 1 branch, 2023 numbers  sFID (Nash et al., arXiv 2103.03841)
    logits   1008 numbers, without the bias                          Inception Score
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from flowback.errors import InputError
from flowback.files import file_hash
from flowback.reading import is_state_dict, read_tensors

__all__ = ["Inception", "InceptionFeatures", "load_inception", "spatial_features"]

_REMEDY = (
    "download weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases on GitHub and give it "
    "as --inception-weights FILE, or use fd_efficientnet_lite0, which needs no download"
)


@dataclass(frozen=True)
class InceptionFeatures:
    """Features of a batch."""

    pool: Float[Tensor, "b p"]
    spatial: Float[Tensor, "b s"]
    logits: Float[Tensor, "b k"]


def spatial_features(branch: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """The features of sFID: the first 7 channels, flattened in the order row, column, channel."""
    return branch[:, :7].permute(0, 2, 3, 1).flatten(1)


class Inception(nn.Module):
    """The network with its three outputs, 2048, 2023 and 1008 numbers wide.

    Args:
        network: torch-fidelity's extractor, asked for `2048` and `logits_unbiased`; it is changed in place.
        fingerprint: hash of the weights.
        published: whether they are those of the published file, from which all published FIDs are.
    """

    pool_dim, spatial_dim = 2048, 2023

    def __init__(self, network: nn.Module, fingerprint: str, published: bool = True) -> None:
        super().__init__()
        # Convolutions on a CPU are 1.5 times faster with the channels innermost.
        self.network = _fused(network.eval().requires_grad_(False)).to(memory_format=torch.channels_last)
        self.fingerprint, self.published = fingerprint, published

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "b c h w"]) -> InceptionFeatures:
        """Features of 8-bit images; grey ones get three equal channels."""
        device = next(self.network.parameters()).device
        images = images.to(device)
        with _output_of(self.network.get_submodule("Mixed_6d.branch1x1")) as branch:
            pool, logits = self.network(images.expand(-1, 3, -1, -1))
        return InceptionFeatures(pool, spatial_features(branch[0]), logits)


def _fused(network: nn.Module) -> nn.Module:
    """Normalisations folded into the convolutions before them: the same function, less to do."""
    for module in network.modules():
        convolution, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.conv, module.bn = fuse_conv_bn_eval(convolution, norm), nn.Identity()
    return network


@contextlib.contextmanager
def _output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of ``module`` while the context lasts."""
    caught: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        yield caught
    finally:
        hook.remove()


def load_inception(weights: Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """The network with its published weights, or others of the same shapes, which it then says.

    Args:
        weights: local file of the weights; None takes torch-fidelity's download, which is kept by torch.hub.
        device: where it runs.

    Raises:
        InputError: no torch-fidelity, or the weights are not there, damaged, or of another network.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        raise InputError(
            "The Inception network needs torch-fidelity: pip install 'flowback-nf[fid]'; "
            "fd_efficientnet_lite0 does not need it."
        ) from None
    state = _download(URL_INCEPTION_V3) if weights is None else _read(weights)
    where = URL_INCEPTION_V3 if weights is None else str(weights)
    # The extractor reads its file with full unpickling; it gets a copy made here from tensors alone.
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
        )
    except (RuntimeError, TypeError, AttributeError):
        raise InputError(
            f"{where} does not hold the weights of the 2015-12-05 Inception; {_REMEDY}."
        ) from None
    kept = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    return Inception(
        network.to(device), _fingerprint(state), _is_published(weights or kept, URL_INCEPTION_V3)
    )


def _is_published(file: Path, url: str) -> bool:
    """Whether the file's SHA-256 begins as the name of the published one ends; True if nothing was kept."""
    expected = re.search(r"-([0-9a-f]{8,})\.pth$", url)
    if expected is None or not file.is_file():
        return True
    return file_hash(file).startswith(expected[1])


def _read(file: Path) -> dict[str, Any]:
    try:
        state = read_tensors(file)
    except OSError as error:
        raise InputError(f"--inception-weights {file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(
            f"--inception-weights {file} is not a file of tensors ({error}); {_REMEDY}."
        ) from None
    if not is_state_dict(state):
        raise InputError(f"--inception-weights {file} holds no named tensors; {_REMEDY}.")
    return state


def _download(url: str) -> dict[str, Any]:
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(f"The Inception weights cannot be downloaded ({error}); {_REMEDY}.") from None


def _fingerprint(state: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
