"""How well a run uses its device: FLOPs of a step, the device's peak, and memory.

MFU (arXiv 2204.02311, Appendix B) = FLOPs of the model in a second / peak FLOPs in a second. The model's
FLOPs are those of likelihood training, three encode passes; what alignment, an encoder or the checkpointing
of activations add is overhead and does not count.
"""

from __future__ import annotations

import resource
import sys

import torch

from flowback.config import RunConfig
from flowback.flow.cost import flops_per_image

__all__ = ["peak_flops", "peak_memory", "step_flops"]

PEAK_TFLOPS = {
    "H200": (66.9, 989.4),
    "H100 PCIe": (51.2, 756.0),
    "H100 NVL": (60.0, 835.0),
    "H100": (66.9, 989.4),
    "A100": (19.5, 312.0),
    "L40S": (91.6, 362.0),
    "L4": (30.3, 121.0),
}
"""Dense peak in fp32 (no TF32, PyTorch's default) and bf16, by a part of the device's name: the makers' data
sheets. The first that fits counts. A CPU has none here: its peak depends on clocks that no name tells."""


def step_flops(config: RunConfig) -> int:
    """Floating-point operations of one step of the whole batch, forward and backward."""
    return 3 * config.train.batch_size * flops_per_image(config.model)


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a device by its name; None for one that the table lacks."""
    for part, (fp32, bf16) in PEAK_TFLOPS.items():
        if part in name:
            return 1e12 * (bf16 if precision == "bf16" else fp32)
    return None


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by PyTorch on the device, or by the process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes
