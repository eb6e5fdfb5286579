"""An accelerator that is not there: PyTorch's device "meta", which has shapes and no values.

Operators that mix tensors of the CPU with its tensors fail here, as they would on a GPU, and what would make
the CPU wait for a GPU is recorded. Autograd runs on "meta"; under FakeTensorMode with "cuda", it does not.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

COPIES = ("aten._to_copy.default", "aten.copy_.default")
INDEXING = ("aten.index.Tensor", "aten.index_put_.default")


class MixedDevicesError(AssertionError):
    """An operator met tensors of the CPU and of the accelerator."""


class Accelerator(TorchDispatchMode):
    """Treats "meta" as an accelerator while it is active.

    Args:
        answer: what the CPU reads where it asks for a number: a bool is this, a number 0 or 1.
    """

    def __init__(self, answer: bool = False) -> None:
        super().__init__()
        self.answer = answer
        self.waits: list[str] = []
        """What waited for the accelerator."""
        self.operators = 0
        """Operators that ran on it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        name, kwargs = str(func), kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if tensor.is_meta]
        self.operators += bool(here)
        if name in COPIES:
            into, source = (args[0], args[1]) if name == COPIES[1] else (None, args[0])
            target = kwargs.get("device") or source.device if into is None else into.device
            if source.is_meta and torch.device(target).type == "cpu":
                self.waits.append("copy to the CPU")
                return into if into is not None else source.new_zeros(source.shape, device="cpu")
        elif name == "aten._local_scalar_dense.default" and here:
            self.waits.append("number to the CPU")
            return here[0].new_tensor(self.answer, device="cpu").item()
        elif name in INDEXING:  # by integers from anywhere
            if any(index is not None and index.is_meta and index.dtype == torch.bool for index in args[1]):
                self.waits.append("boolean index")  # its result has a size that only the accelerator knows
        elif here and any(not tensor.is_meta and tensor.ndim for tensor in tensors):
            devices = [f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors]
            raise MixedDevicesError(f"{name}: {', '.join(devices)}")
        results = func(*args, **kwargs)
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.is_meta and result.dtype == torch.float64:
                raise TypeError(f"{name}: MPS has no float64")
        return results

    def __enter__(self):
        def autocast(device, *arguments, **options):
            return (
                contextlib.nullcontext()
                if device == "meta"
                else self._autocast(device, *arguments, **options)
            )

        self._autocast, torch.autocast = torch.autocast, autocast  # it does not know "meta"
        return super().__enter__()

    def __exit__(self, *error):
        torch.autocast = self._autocast
        return super().__exit__(*error)
