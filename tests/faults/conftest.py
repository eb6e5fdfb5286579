import dataclasses

import pytest

import runs
from flowback.config import DataConfig
from flowback.data.images import load_images


@pytest.fixture
def config():
    return runs.tiny_config()


@pytest.fixture(scope="session")
def digits():
    return load_images(DataConfig(), 8, 1, "train")


@pytest.fixture
def replaced(config):
    """The tiny run with other training options."""
    return lambda **train: dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
