import dataclasses

import pytest


@pytest.fixture
def replaced(config):
    """The tiny run with other training options."""
    return lambda **train: dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
