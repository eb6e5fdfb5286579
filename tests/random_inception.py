"""Weights of the Inception architecture, random but scaled so that signals neither die nor grow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch_fidelity.feature_extractor_inceptionv3 as extractor
from torch import Tensor, nn

__all__ = ["random_weights"]


@contextlib.contextmanager
def _nothing_loaded() -> Iterator[None]:
    with (
        mock.patch.object(extractor, "load_state_dict_from_url", return_value={}),
        mock.patch.object(extractor.FeatureExtractorInceptionV3, "load_state_dict", return_value=None),
    ):
        yield


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """A state dict that torch-fidelity's extractor loads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with _nothing_loaded():
            network = extractor.FeatureExtractorInceptionV3("random", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.8, 1.2)
    return network.state_dict()
