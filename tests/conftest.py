"""Shape annotations are checked in tests: jaxtyping with beartype wraps flowback's functions.

Not those of ``cli``, where the option parser fills dataclasses with marks of its own, nor of ``config`` and
``sample_folder``, whose options check themselves, nor of the page of ``app``, where Gradio asks which of its
functions are generators.
"""

import os

from jaxtyping import install_import_hook

CHECKED = (
    "alignment checkpoint classification data evaluation flow flow_pipeline hub model model_card named_model "
    "nn sampling students tables tarflow_weights training app.flows app.inputs app.pictures app.image_figures"
)
hook = install_import_hook([f"flowback.{name}" for name in CHECKED.split()], "beartype.beartype")
hook.__enter__()

import pytest  # noqa: E402
import torch  # noqa: E402

import runs  # noqa: E402

torch.set_num_threads(1)  # fixtures of modules come before those of tests


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """The digits' features are computed once for all tests, and the user's own cache is left alone."""
    os.environ["FLOWBACK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config():
    """A run that takes a second; :mod:`runs` trains it in processes of its own, too."""
    return runs.tiny_config()


@pytest.fixture(scope="session")
def digits():
    """The images it trains on."""
    return runs.digits(runs.tiny_config())


def pytest_collection_modifyitems(items):
    """The longest file first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
