import pytest

import runs


@pytest.fixture
def targets():
    return runs.RandomTargets()
