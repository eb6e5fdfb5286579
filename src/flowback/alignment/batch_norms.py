"""Batch norms of a frozen model, folded into the convolutions before them.

W·x + b, then (y − μ)/σ·γ + β, is one convolution with W·γ/σ and (b − μ)·γ/σ + β. On a CPU the norms read and
write every feature map once more, which takes as long as the convolutions.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold", "foldable"]


class _Tracer(fx.Tracer):
    """Records calls of convolutions and norms, whatever class of theirs they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def foldable(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution and the batch norm that alone reads it; none of what cannot be traced."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return []
    try:
        graph = _Tracer().trace(model)
    except Exception:  # it may do anything with what stands for its input
        return []
    modules, calls = dict(model.named_modules()), [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    return [
        (str(conv.target), str(norm.target))
        for norm in calls
        for conv in norm.args[:1]
        if conv in calls and len(conv.users) == 1
        if isinstance(modules[conv.target], nn.Conv2d) and _understood(modules[norm.target])
        if times[conv.target] == times[norm.target] == 1
    ]


def _understood(norm: nn.Module) -> bool:
    """Whether it is PyTorch's norm, or timm's with an activation behind it."""
    kind = type(norm)
    timms = kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
    return (kind is nn.BatchNorm2d or timms) and getattr(norm, "running_mean", None) is not None


def fold(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Fold pairs that :func:`foldable` names, in place; the model must be in eval mode.

    What a norm does after its affine map, such as an activation, stays in its place.
    """
    for conv_name, norm_name in pairs:
        norm = model.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm2d)
        conv = model.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        model.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
