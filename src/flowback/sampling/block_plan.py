"""How to sample one checkpoint fastest on one device, measured once and kept beside the checkpoint.

For every block a plan says: sequential, or windowed Jacobi with this window and first guess. Sequential
decoding is the reference for time and error. Candidates are measured on some windows of a batch of real
noise, the promising ones on whole blocks, and the chosen plan on the whole flow: where its images differ
from the sequential ones by more than the promised error, the sweeps' tolerance is tightened.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from flowback.checked import from_dict
from flowback.checkpoint import PACKAGED
from flowback.errors import InputError
from flowback.files import cache_folder, write_json
from flowback.flow import TARFlow
from flowback.flow.block import Labels
from flowback.flow.image_model import ImageModel
from flowback.provenance import environment
from flowback.reading import read_json
from flowback.sampling.decoder import Decoder, Precision
from flowback.sampling.jacobi import Init, first_guess, solve_window
from flowback.sampling.sampler import BlockPlan, Sampler, drawing_level, noise
from flowback.task_config import SampleConfig

__all__ = [
    "Measured",
    "Plan",
    "load_plan",
    "make_plan",
    "plan_file",
    "plan_record",
    "plan_sampling",
    "resolve_plan",
    "save_plan",
    "wanted",
    "weights_hash",
]

WINDOWS = (4, 8, 16, 32, 64)


INITS: tuple[Init, ...] = ("z", "zeros")


_PROBES = 3
"""Windows of a block that a candidate is first measured on."""


_GAIN = 0.95
"""A candidate must take less than this share of the sequential time."""


@dataclass(frozen=True)
class Measured:
    """One way to invert a block, as it was measured."""

    block: int
    window: int
    init: Init
    seconds: float
    """Of the whole block; of a candidate measured on some windows, extrapolated."""
    sweeps: float
    """Mean sweeps a window."""
    seconds_per_sweep: float
    errors: tuple[float, ...]
    """Largest error against the exact tokens after each sweep, over the windows measured."""


@dataclass(frozen=True)
class Plan:
    """The blocks' plans, and what they hold for."""

    checkpoint: str
    """SHA-256 of the weights; see :func:`weights_hash`."""
    device: str
    batch_size: int
    precision: Precision
    guidance: float
    ramp: bool
    formula: str
    attention_temperature: float
    guided_blocks: int | None
    tolerance: float
    """Promised largest difference from the sequential images, on the [-1, 1] scale, before denoising."""
    noise: float | None = None
    """Level that images are drawn at, of a flow with a range of them."""
    error: float = 0.0
    """Difference that was measured."""
    sequential_seconds: float = 0.0
    """Of a batch, as it is decoded at once."""
    seconds: float = 0.0
    blocks: tuple[BlockPlan, ...] = ()
    """From block 1, at the data, to block T."""
    measured: tuple[Measured, ...] = field(default=(), compare=False, repr=False)
    """What it was chosen from; empty for a plan that was loaded."""

    def misfit(self, asked: Plan) -> str | None:
        """Why this plan does not hold for the sampling that ``asked`` describes; None if it does."""
        if self.checkpoint != asked.checkpoint:
            return "it was made for another checkpoint"
        guided = ("guidance", *_GUIDED) if self.guidance or asked.guidance else ()
        for name in ("device", "batch_size", "precision", "noise", *guided):
            planned, wanted = getattr(self, name), getattr(asked, name)
            if planned != wanted:
                return f"it was made for {name.replace('_', ' ')} {planned}, not {wanted}"
        if self.tolerance > asked.tolerance:
            return f"it promises an error of {self.tolerance:g}, but {asked.tolerance:g} is asked for"
        return None


_GUIDED = ("ramp", "formula", "attention_temperature", "guided_blocks")
"""What else decides about guided images."""

_SEED = 2**31
"""First seed of the noise that is measured on: far from those that people sample with."""


def weights_hash(flow: ImageModel) -> str:
    """SHA-256 of a model's weights: that of the ``model.safetensors`` which a checkpoint of them holds."""
    weights = {name: value.detach().cpu().contiguous() for name, value in flow.state_dict().items()}
    return hashlib.sha256(save(weights, metadata={"format": "pt"})).hexdigest()


def wanted(flow: TARFlow, config: SampleConfig) -> Plan:
    """A plan without blocks, for comparison: what sampling with these options needs a plan to hold for.

    On the CPU the device is its name and the number of threads.
    """
    names = ("batch_size", "precision", "guidance", *_GUIDED, "tolerance")
    device = str(environment(flow.device)["device"])
    settings = {name: getattr(config, name) for name in names}
    return Plan(weights_hash(flow), device, **settings, noise=drawing_level(flow, config.noise))


def resolve_plan(
    flow: TARFlow, config: SampleConfig, folder: Path | None = None
) -> tuple[tuple[BlockPlan, ...] | None, str | None]:
    """The plans that ``--sampler`` means, one per block, or None for sequential; and a note for the user.

    ``auto`` takes the checkpoint's plan if it was measured for the same sampling on this device.

    Args:
        flow: the model, on the device that samples.
        config: the options of sampling.
        folder: the flow's checkpoint, whose plan ``auto`` takes.

    Raises:
        InputError: a damaged plan.
    """
    if config.sampler != "auto":
        return BlockPlan.windows(flow, config), None
    if folder is None or not plan_file(folder).is_file():
        return None, "Sequential: the model has no plan; `flowback plan` makes one."
    plan = load_plan(plan_file(folder))
    misfit = plan.misfit(wanted(flow, config))
    if misfit:
        return None, f"Sequential: the plan does not fit, {misfit}; `flowback plan` makes one that does."
    swept = sum(block.window > 1 for block in plan.blocks)
    return plan.blocks, f"Planned: {swept} of {len(plan.blocks)} blocks by Jacobi sweeps."


@torch.inference_mode(False)
@torch.no_grad()
def plan_sampling(flow: TARFlow, config: SampleConfig | None = None, **options: Any) -> Plan:
    """Measure how to sample a flow fastest on its device: ``flowback plan`` without the file.

    Args:
        flow: the model; its weights should be trained, as random ones hide how hard the blocks are.
        config: how it will be sampled; ``sampler`` and ``window`` are ignored.
        **options: fields of :class:`flowback.SampleConfig` that replace those of ``config``.

    Raises:
        InputError: options out of range, or guidance that would have no effect.

    Example:
        >>> import flowback
        >>> flow = flowback.create_flow("digits", num_classes=10, width=16, head_dim=8, layers=1, blocks=2)
        >>> plan = flowback.plan_sampling(flow, batch_size=2, guidance=1.0)
        >>> sampler = flowback.Sampler(flow, guidance=1.0, batch_size=2, plans=plan.blocks)
        >>> sampler([3, 7], seeds=[0, 1]).shape
        torch.Size([2, 1, 8, 8])
    """
    config = replace(config or SampleConfig(), **options)
    sampler = Sampler.from_config(flow, config, (BlockPlan(),) * flow.config.blocks)
    classes, count = flow.config.num_classes or 0, sampler.images_at_once
    labels = flow.labels([index % classes for index in range(count)], count) if classes else None
    sampler.guidance.check(labels is not None)
    return make_plan(sampler, labels, noise(flow, range(_SEED, _SEED + count)), wanted(flow, config))


def make_plan(
    sampler: Sampler, labels: Labels, z: Float[Tensor, "b n d"], asked: Plan, repeats: int = 2
) -> Plan:
    """Measure, choose, verify.

    Args:
        sampler: with the guidance that the plan is for.
        labels: of the batch that is measured, checked.
        z: its noise.
        asked: what the plan is to hold for, from :func:`wanted`.
        repeats: how often a whole block is timed; the fastest counts.
    """
    flow, tolerance = sampler.flow, asked.tolerance
    scales = sampler.guidance.scales(len(z), z)
    measured, plans, exact, base = [], {}, [z], 0.0
    for index in range(flow.config.blocks, 0, -1):
        block = _Block(sampler, index, labels, scales, exact[-1])
        seconds, x = block.timed(BlockPlan(), repeats)
        base += seconds
        exact.append(block.module.reorder(x))
        measured.append(Measured(index, 1, "z", seconds, 1.0, seconds / max(z.shape[1] - 1, 1), (0.0,)))
        candidates = list(_candidates(block, x, tolerance, seconds))
        measured += candidates
        plans[index] = BlockPlan(tolerance=tolerance)
        best = seconds * _GAIN
        for candidate in sorted(candidates, key=lambda m: m.seconds)[:2]:
            plan = BlockPlan(candidate.window, candidate.init, tolerance)
            if candidate.seconds < best and (took := block.timed(plan, repeats)[0]) < best:
                plans[index], best = plan, took
    chosen, error, seconds = _verified(
        lambda blocks: list(sampler.invert(z, labels, scales, blocks))[-1], plans, exact[-1], tolerance
    )
    return replace(
        asked,
        error=error,
        sequential_seconds=base,
        seconds=base if all(plan.window == 1 for plan in chosen) else seconds,
        blocks=chosen,
        measured=tuple(sorted(measured, key=lambda m: (m.block, m.window, m.init))),
    )


class _Block:
    """A block with the noise it is measured on, in its own order."""

    def __init__(self, sampler: Sampler, index: int, labels: Labels, scales: Tensor, z: Tensor) -> None:
        self.sampler, self.index, self.labels, self.scales = sampler, index, labels, scales
        self.module = sampler.flow.blocks[index - 1]
        self.z = self.module.reorder(z)

    def decoder(self, new: int) -> Decoder:
        """Its decoder, with room for so many tokens a step."""
        return self.sampler.decoder(self.index, self.labels, self.scales, new)

    def timed(self, plan: BlockPlan, repeats: int) -> tuple[float, Tensor]:
        """Seconds of the fastest of some runs, and the result."""
        times = []
        for _ in range(repeats):
            decoder = self.decoder(plan.new)
            started = time.perf_counter()
            x = plan.solve(decoder, self.z)
            _wait(x)
            times.append(time.perf_counter() - started)
        return min(times), x


def _candidates(
    block: _Block, exact: Tensor, tolerance: float, sequential_seconds: float
) -> Iterator[Measured]:
    """Every window and first guess, on some windows with the exact tokens before them."""
    z, tokens = block.z, block.z.shape[1]
    for window in (*(w for w in WINDOWS if w < tokens - 1), tokens - 1):
        starts = list(range(1, tokens, window))
        probes = sorted({starts[round(k * (len(starts) - 1) / (_PROBES - 1))] for k in range(_PROBES)})
        allowed = sequential_seconds * window / (tokens - 1)
        for init in INITS:
            # Filled with the exact tokens once; windows are then measured from the last to the first, so that
            # what a window writes lies behind those still to come.
            decoder = block.decoder(max(tokens - 1, 2 * window))
            decoder.step(exact[:, :-1], 0)
            probed = []
            for start in reversed(probes):
                end = min(start + window, tokens)
                guess = torch.cat([exact[:, :start], first_guess(z, init)[:, start:]], 1)
                probed.append(_probe(decoder, z, guess, exact, start, end, tolerance, 2 * allowed))
            counts = [len(curve) for curve, _, _ in probed]
            worst = [max(c[min(k, len(c) - 1)] for c, _, _ in probed) for k in range(max(counts))]
            took = sum(seconds for _, seconds, _ in probed)
            share = sum(min(start + window, tokens) - start for start in probes) / (tokens - 1)
            whole = took / share if all(finished for _, _, finished in probed) else math.inf
            mean = sum(counts) / len(counts)
            yield Measured(block.index, window, init, whole, mean, took / sum(counts), tuple(worst))


def _probe(
    decoder: Decoder,
    z: Tensor,
    x: Tensor,
    exact: Tensor,
    start: int,
    end: int,
    tolerance: float,
    allowed: float,
) -> tuple[list[float], float, bool]:
    """Errors after each sweep of one window, seconds, and whether it converged in the ``allowed`` ones."""
    errors, took = [], 0.0
    for first in range(start, end):
        # One sweep at a time, the error read between them; exact tokens leave as in a run of all sweeps.
        before = x[:, first:end].clone()
        started = time.perf_counter()
        solve_window(decoder, z, x, first, end, first - 1, None, 1)
        _wait(x)
        took += time.perf_counter() - started
        errors.append(float((x[:, start:end] - exact[:, start:end]).abs().max()))
        if float((x[:, first:end] - before).abs().max()) <= tolerance:
            return errors, took, True
        if took > allowed:
            return errors, took, False
    return errors, took, True


def _verified(
    invert: Callable[[Sequence[BlockPlan]], Tensor],
    plans: dict[int, BlockPlan],
    exact: Tensor,
    promised: float,
) -> tuple[tuple[BlockPlan, ...], float, float]:
    """Plans whose images keep the promise, with their error and seconds."""
    for tightening in (1, 10, 100, 1000):
        tightened = {i: replace(plan, tolerance=promised / tightening) for i, plan in plans.items()}
        chosen = tuple(tightened[index] for index in sorted(tightened))
        started = time.perf_counter()
        x = invert(chosen)
        _wait(x)
        seconds = time.perf_counter() - started
        error = float((x - exact).abs().max())
        if error <= promised / 2:  # other noise may be harder
            return chosen, error, seconds
    return tuple(BlockPlan(tolerance=promised) for _ in plans), 0.0, 0.0


def plan_file(checkpoint: Path) -> Path:
    """Where the plan of a checkpoint lies: in its folder; of one that comes with flowback, in the cache."""
    if checkpoint.parent == PACKAGED:
        return cache_folder() / "plans" / f"{checkpoint.name}.json"
    return checkpoint / "sampling-plan.json"


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan with what it was chosen from."""
    write_json(path, {"environment": environment(), **plan_record(plan)})


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan and what was measured, apart, ready for JSON."""
    values = asdict(plan)
    measured = values.pop("measured")
    return {"plan": values, "measured": measured}


def load_plan(path: Path) -> Plan:
    """Read a plan, without what was measured.

    Raises:
        InputError: no plan, or damaged.
    """
    try:
        values = read_json(path)["plan"]
        blocks = tuple(from_dict(BlockPlan, block) for block in values.pop("blocks"))
        return replace(from_dict(Plan, values), blocks=blocks)
    except FileNotFoundError:
        raise InputError(f"There is no plan at {path}; make one with `flowback plan`.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged; make the plan again with `flowback plan`.") from None


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
