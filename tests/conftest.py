"""Shape annotations are checked in tests: jaxtyping with beartype wraps every function of flowback."""

from jaxtyping import install_import_hook

hook = install_import_hook("flowback", "beartype.beartype")
hook.__enter__()

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
