"""What a run reports: bad steps, vanished losses, the blocks' health, speed, memory, trackers.

MFU (arXiv 2204.02311, Appendix B) = FLOPs of the model in a second / peak FLOPs in a second. The model's
FLOPs are those of likelihood training, three encode passes; what alignment, an encoder or the checkpointing
of activations add is overhead and does not count.

The balance of the two losses' gradients, block by block, shows the tension between them that the paper
blames for the forward strategy's results (arXiv 2511.22345).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from flowback.alignment.align import Noised, losses
from flowback.alignment.loss import alignment_loss
from flowback.alignment.strategies import encode
from flowback.checked import to_dict
from flowback.config import AlignmentConfig, RunConfig
from flowback.errors import InputError
from flowback.flow.cost import flops_per_image
from flowback.flow.levels import levels_at
from flowback.model import Flow

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = [
    "Guard",
    "block_statistics",
    "check_trackers",
    "gradient_balance",
    "open_trackers",
    "peak_flops",
    "peak_memory",
    "show",
    "step_flops",
    "sums_by_level",
    "tracker_settings",
    "vanished",
]

MEMORY = 0.98
"""Decay of the running mean of gradient norms: about 50 steps."""


class Guard:
    """Judges each step by its gradient norm, without waiting for the device.

    A step is bad if the norm is not finite, if it is exactly 0 (nothing reached the weights: a loss that was
    NaN may have been replaced by 0), or if it spikes. The norm is taken after the gradients of all processes
    are joined, so all come to the same verdict. A bad step is left out on the device itself; the tally is
    read only when somebody looks.

    Args:
        spike: a norm above this many times the running mean is bad; None allows spikes.
        device: where the norms are.
    """

    def __init__(self, spike: float | None, device: torch.device) -> None:
        self.spike = spike
        self.typical = torch.zeros((), device=device)
        """Running mean of the good norms; 0 before the first."""
        self.bad = torch.zeros((), dtype=torch.int64, device=device)
        """Bad steps so far."""
        self.last = torch.zeros((), dtype=torch.int64, device=device)
        """The last bad step; 0 for none."""
        self.norm = torch.zeros((), device=device)
        """Its gradient norm."""

    def judge(self, norm: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
        """1 for a bad step, else 0, on the device; ``step`` is counted from 1."""
        norm = norm.detach().float()
        bad = ~torch.isfinite(norm) | (norm == 0)
        if self.spike is not None:
            bad = bad | ((self.typical > 0) & (norm > self.spike * self.typical))
        mean = torch.where(self.typical > 0, MEMORY * self.typical + (1 - MEMORY) * norm, norm)
        self.typical = torch.where(bad, self.typical, mean)
        self.bad = self.bad + bad
        self.last = torch.where(bad, step, self.last)
        self.norm = torch.where(bad, norm, self.norm)
        return bad.float()

    def reason(self) -> str:
        """What is wrong with the gradient of the last bad step of this process."""
        norm = float(self.norm)
        if not math.isfinite(norm):
            return "is not finite"
        if norm == 0:
            return "is exactly 0 (NaN replaced by 0?)"
        return f"spikes (its norm is {norm:.3g}, the running mean {float(self.typical):.3g})"

    def state_dict(self) -> dict[str, Tensor]:
        """The tally, for the checkpoint."""
        return {"typical": self.typical, "bad": self.bad, "last": self.last}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with a stored tally."""
        device = self.typical.device
        self.typical, self.bad, self.last = (state[name].to(device) for name in ("typical", "bad", "last"))


def vanished(row: Mapping[str, Any]) -> list[str]:
    """One sentence for each loss in a row of metrics that trains nothing; it says where to look.

    A loss is exactly 0 only if NaN was replaced by 0, or if a cosine was taken with zeros.

    Example:
        >>> vanished({"nll": 1.2, "alignment": -0.5, "cosine_7_6": 0.5})
        []
        >>> len(vanished({"nll": 1.2, "alignment": 0.0, "cosine_7_6": 0.0}))
        1
    """

    def named(prefix: str) -> dict[str, float]:
        return {name: value for name, value in row.items() if name.startswith(prefix)}

    sentences = []
    if row.get("nll") == 0:
        sentences.append(
            "The likelihood (nll) is exactly 0 and trains nothing; look for NaN replaced by 0 in the images, "
            "and at log_scale_min and log_scale_max in metrics.jsonl."
        )
    dead = [name for name, v in named("cosine_").items() if v == 0 or not math.isfinite(v)]
    if dead:
        sentences.append(
            f"The alignment trains nothing at {', '.join(dead)}, which is exactly 0 or not finite; look at "
            "the encoder's features (all zero, or NaN replaced by 0?) and at the projector's weights."
        )
    for loss, where in (
        ("nll", "look for NaN replaced by 0 in the images"),
        ("alignment", "look at the projector (do its units still answer?) and at the encoder's features"),
    ):
        norms = named(f"grad_{loss}_").values()
        if norms and not any(norms):
            sentences.append(f"The gradient of {loss} is exactly 0 in all blocks; {where}.")
    return sentences


@torch.no_grad()
def block_statistics(flow: Flow, batch: Noised) -> dict[str, float]:
    """Size of each block's output and range of its log-scales on a batch; one more encode pass, with labels.

    Returns:
        For block t: ``z2_t``, mean of its squared output (1 is the prior's, at the last block), and
        ``log_scale_min_t`` and ``log_scale_max_t``. Log-scales that run away come before NaN does.
    """
    statistics: dict[str, Tensor] = {}
    x = flow.tokens(batch.images)
    for t, output in enumerate(flow.encode_blocks(x, batch.labels, levels=batch.levels), start=1):
        statistics[f"z2_{t}"] = output.z.square().mean()
        statistics[f"log_scale_min_{t}"] = output.prediction.log_scale.min()
        statistics[f"log_scale_max_{t}"] = output.prediction.log_scale.max()
    return {name: float(value) for name, value in statistics.items()}


LEVELS = 3
"""Parts of a range of noise levels whose figures are shown."""


def sums_by_level(
    levels: Float[Tensor, " b"], values: Sequence[Float[Tensor, " b"]], config: RunConfig
) -> Float[Tensor, "p v"]:
    """Sums of images' values over those of low, middle and high noise; the first column counts the images.

    Training draws a third of all levels in each part: its ends are quantiles of ``train.levels``.
    """
    ends = levels_at(torch.arange(1, LEVELS) / LEVELS, config.model, config.train)
    parts = torch.bucketize(levels, ends.to(levels.device))
    columns = torch.stack([torch.ones_like(levels), *(value.to(levels.dtype) for value in values)], dim=1)
    # Not a product with 0: a value that is not finite stays in its part.
    rows = [torch.where((parts == part)[:, None], columns, 0).sum(0) for part in range(LEVELS)]
    return torch.stack(rows)


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
    """Most bytes held so far: by PyTorch on the device, or by the process where the device is the CPU.

    0 on Windows, where Python cannot tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    with contextlib.suppress(OSError):  # Linux, whose ru_maxrss begins at the peak of the process before exec
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes


def gradient_balance(
    flow: Flow,
    projector: nn.Module,
    batch: Noised,
    targets: Float[Tensor, "b m f"],
    config: AlignmentConfig,
) -> dict[str, float]:
    """Gradients of nll and of the weighted alignment loss, block by block, on one batch.

    Costs two training steps, so it is meant for intervals. It leaves ``.grad`` alone and does not touch
    the random generator; with several processes it covers only the caller's batch.

    Returns:
        For block t: ``grad_nll_t`` and ``grad_alignment_t``, 2-norms over the block's parameters, the second
        with its weight, 0 where the strategy does not reach; and ``grad_cosine_t``, the cosine between the
        two, left out where one of them is 0. Below 0 the losses pull against each other. If no image's level
        counts in the alignment (``alignment.levels``), only ``grad_nll_t``.
    """
    blocks = [[p for p in block.parameters() if p.requires_grad] for block in flow.blocks]
    with torch.enable_grad():
        likelihood = _gradients(losses(flow, None, config, batch).loss, blocks)
        hidden = encode(flow, *batch[:3], config, batch.levels).hidden
        alignment = _gradients(
            config.weight
            * alignment_loss(hidden, targets, projector, config.spatial_norm, batch.alignment_weights).loss,
            blocks,
        )
    if batch.alignment_weights is not None and not batch.alignment_weights.any():
        return {f"grad_nll_{t}": float(nll.norm()) for t, nll in enumerate(likelihood, start=1)}
    balance: dict[str, float] = {}
    for t, (nll, aligned) in enumerate(zip(likelihood, alignment, strict=True), start=1):
        norms = float(nll.norm()), float(aligned.norm())
        balance[f"grad_nll_{t}"], balance[f"grad_alignment_{t}"] = norms
        if all(norms):
            balance[f"grad_cosine_{t}"] = float(nll @ aligned) / (norms[0] * norms[1])
    return balance


def _gradients(loss: Tensor, blocks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The gradient of each block's parameters, in one vector."""
    parameters = [parameter for block in blocks for parameter in block]
    gradients = iter(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return [torch.cat([next(gradients).flatten() for _ in block]) for block in blocks]


PROJECT = "flowback"


def check_trackers(config: RunConfig) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        InputError: names the package.
    """
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--train.trackers {name} needs a package: pip install flowback-nf[{name}].")


def tracker_settings(config: RunConfig, out: Path) -> dict[str, Any]:
    """Arguments of Accelerator."""
    settings = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard"))
    return {"log_with": list(config.train.trackers) or None, "project_config": settings}


def open_trackers(accelerator: Accelerator, config: RunConfig, out: Path, identity: str, step: int) -> None:
    """Start the trackers, or continue those of a stopped run.

    Rows after ``step``, which the run writes again: TensorBoard hides the old ones, the others keep them.

    Args:
        accelerator: made with :func:`tracker_settings`.
        config: the run, shown beside it.
        out: the run's folder.
        identity: the same for all parts of a run.
        step: the run continues from here.
    """
    accelerator.init_trackers(
        PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"id": identity, "name": out.name, "resume": "allow", "dir": str(out)},
            "trackio": {"name": f"{out.name}-{identity}", "resume": "allow"},
        },
    )
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # which would make a run of its own of the settings
            tracker.store_init_configuration(to_dict(config))


def show(
    accelerator: Accelerator,
    row: Mapping[str, float | int],
    pictures: Mapping[str, UInt8[Tensor, "c h w"]],
    step: int,
) -> None:
    """Send a row and pictures to all trackers."""
    if row:
        accelerator.log(dict(row), step=step)
    for name, picture in pictures.items():
        channels_last = picture.expand(3, -1, -1).permute(1, 2, 0).numpy()
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None].numpy()}, step=step)
            elif tracker.name == "wandb":
                tracker.log_images({name: [channels_last]}, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Image(channels_last)}, step=step)
