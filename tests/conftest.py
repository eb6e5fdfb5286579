"""Shape annotations are checked in tests: jaxtyping with beartype wraps flowback's functions.

Not those of ``cli``: the option parser fills its dataclasses with marks of its own.
"""

from jaxtyping import install_import_hook

CHECKED = "alignment checkpoint classification config data evaluation flow interop nn sampling training"
hook = install_import_hook([f"flowback.{name}" for name in CHECKED.split()], "beartype.beartype")
hook.__enter__()

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
