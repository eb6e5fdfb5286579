"""Images a second of flowback's samplers, and of apple/ml-tarflow's on the same weights and noise.

    python benchmarks/sampling.py --reference PATH_TO_ML_TARFLOW --json sampling.json

The flow (64×64, patch 4, width 256, 4 blocks of 4 layers, two classes) is first trained for 300 steps of two
random crops of scikit-learn's two photographs, since random weights hide how hard the blocks are; it is
kept in runs/ and used again. Times are from seeds or noise to images, without denoising. ``ratio`` is
ml-tarflow's time over ours, ``to_forward`` our time over that of one forward pass of the same batch, and
``to_peak`` our time over that of the same FLOPs at the speed of a large matrix product.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

from flowback import (
    BlockPlan,
    Flow,
    Guidance,
    ModelConfig,
    RunConfig,
    Sampler,
    TrainConfig,
    load,
    plan_sampling,
)
from flowback.checkpoint import save
from flowback.data.pixels import from_levels
from flowback.flow.cost import flops_per_image
from flowback.progress import track
from flowback.sampling.decoder import Precision
from flowback.sampling.sampler import noise
from harness import interleave, write_rows

MODEL = ModelConfig(image_size=64, patch_size=4, width=256, blocks=4, layers=4, num_classes=2)
CLASSES = ("china", "flower")


@dataclass(frozen=True)
class Options:
    """Time the samplers."""

    json: Path
    """The file to write."""
    reference: Path | None = None
    """A checkout of apple/ml-tarflow to compare with."""
    batches: tuple[int, ...] = (1, 16, 64)
    """Images decoded at once."""
    guidance: float = 1.0
    """Guidance scale, ramped over the tokens, of the guided rows."""
    guided: bool = True
    """Time the guided rows too."""
    narrow: bool = True
    """Time bf16, and keys and values alone in bf16, too."""
    jacobi: bool = True
    """Time a plan made on the spot (``auto``), and Jacobi sweeps in windows of 16 (``jacobi``), too."""
    warm_up: int = 1
    """Calls of each that are not timed."""
    repeats: int = 3
    """Times that each call is timed; the median is kept."""
    process_time: bool = False
    """Count processor time, not wall time: for a machine that others use too, with OMP_NUM_THREADS=1."""
    steps: int = 300
    """Training steps before."""
    device: str = "cpu"
    """Where all of it runs."""


def photographs(batch: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random square crops of the photographs, scaled to 64×64 on [-1, 1], and which photograph each is of."""
    pictures, labels, crops = load_sample_images().images, [], []
    for _ in range(batch):
        label, side = int(generator.integers(2)), int(generator.integers(64, 257))
        picture = pictures[label]
        top, left = (int(generator.integers(edge - side + 1)) for edge in picture.shape[:2])
        crop = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
        crop = F.interpolate(crop.float(), size=(64, 64), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if generator.integers(2) else crop)
        labels.append(label)
    return from_levels(torch.cat(crops)), torch.tensor(labels)


def trained_flow(steps: int, device: str) -> Flow:
    """The flow after some steps of training; kept in runs/."""
    folder = Path("runs") / f"benchmark-sampling-{steps}"
    if not folder.exists():
        torch.manual_seed(0)
        flow, generator = Flow(MODEL), np.random.default_rng(0)
        optimiser = torch.optim.AdamW(flow.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=1e-4)
        for step in track(range(steps), steps, "training", "steps"):
            images, labels = photographs(2, generator)
            images = images + MODEL.noise_std * torch.randn_like(images)
            loss = -flow(images, labels, drop=torch.rand(len(images)) < 0.1).log_prob.mean() / MODEL.dims
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = 5e-4 * min(1, (step + 1) / 50, (steps - step) / (0.3 * steps))
            optimiser.step()
            if (step + 1) % 50 == 0:
                print(f"step {step + 1}: nll {loss.item():.3f} nats a dimension", flush=True)
        save(folder, RunConfig(model=MODEL, train=TrainConfig(steps=steps, batch_size=2)), flow.state_dict())
    return load(folder, device)


def reference_model(checkout: Path, flow: Flow) -> Any:
    """ml-tarflow's model with the weights of ``flow``."""
    file = checkout / "transformer_flow.py"
    spec = importlib.util.spec_from_file_location("transformer_flow", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = flow.config
    model = module.Model(
        c.channels, c.image_size, c.patch_size, c.width, c.blocks, c.layers, num_classes=c.num_classes
    )
    names = [
        ("body.layers.", "attn_blocks."),
        (".mlp.up.", ".mlp.main.0."),
        (".mlp.down.", ".mlp.main.2."),
        (".position", ".pos_embed"),
        (".class_table", ".class_embed"),
    ]
    weights = model.state_dict()
    for name, value in flow.state_dict().items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        weights[name] = value.reshape(weights[name].shape)
    model.load_state_dict(weights)
    return model.to(flow.device).eval()


def matmul_peak(device: torch.device, clock: Callable[[], float]) -> float:
    """FLOP/s of a product of two matrices of 1536 rows and columns."""
    a = torch.randn(1536, 1536, device=device)
    seconds = interleave({"product": lambda: a @ a}, device, repeats=8, clock=clock)["product"]
    return 2 * 1536**3 / min(seconds)


def planned(flow: Flow, batch: int, guidance: Guidance) -> tuple[BlockPlan, ...]:
    """The blocks' plans for such a batch, measured on other noise."""
    scale = float(torch.as_tensor(guidance.scale))
    plan = plan_sampling(flow, guidance=scale, ramp=guidance.ramp, batch_size=batch)
    print("plan:", ", ".join(f"block {i} window {p.window}" for i, p in enumerate(plan.blocks, start=1)))
    return plan.blocks


@torch.no_grad()
def time_batch(flow: Flow, reference: Any, options: Options, batch: int, peak: float) -> list[dict[str, Any]]:
    """Rows for one batch size."""
    seeds, labels = range(batch), torch.arange(batch, device=flow.device) % 2
    z = noise(flow, seeds)
    images = flow.images(z).clamp(-1, 1)
    guided = Guidance(options.guidance, ramp=True)
    kept: dict[str, Tensor] = {}
    calls: dict[str, Callable[[], object]] = {f"forward-b{batch}": lambda: flow(images, labels)}

    def ours(
        name: str,
        guidance: Guidance,
        precision: Precision = "fp32",
        plans: Sequence[BlockPlan] | None = None,
    ) -> None:
        sampler = Sampler(flow, guidance, False, batch_size=batch, precision=precision, plans=plans)

        def call() -> None:
            kept[name] = sampler(labels, seeds)

        calls[name] = call

    def theirs(name: str, w: float) -> None:
        def call() -> None:
            # Their sampler writes into its argument.
            kept[name] = reference.reverse(z.clone(), labels, guidance=w, annealed_guidance=True)

        calls[name] = call

    for suffix, guidance in (("", Guidance()), ("-guided", guided))[: 2 if options.guided else 1]:
        ours(f"ours-sequential-b{batch}{suffix}", guidance)
        if options.narrow:
            ours(f"ours-sequential-kv-bf16-b{batch}{suffix}", guidance, "kv-bf16")
            ours(f"ours-sequential-bf16-b{batch}{suffix}", guidance, "bf16")
        if options.jacobi:
            ours(f"ours-auto-b{batch}{suffix}", guidance, plans=planned(flow, batch, guidance))
            if not suffix:
                every = [BlockPlan(window=16, tolerance=1e-4)] * flow.config.blocks
                ours(f"ours-jacobi-b{batch}", guidance, plans=every)
        if reference is not None:
            theirs(f"ml-tarflow-b{batch}{suffix}", float(torch.as_tensor(guidance.scale)) if suffix else 0.0)
    started = time.perf_counter()
    clock = time.process_time if options.process_time else time.perf_counter
    seconds = interleave(calls, flow.device, options.repeats, options.warm_up, clock=clock)
    print(f"batch {batch}: {time.perf_counter() - started:.0f} s")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, value in median.items():
        row: dict[str, Any] = {"name": name, "seconds": value, "all_seconds": seconds[name]}
        row["images_per_second"] = batch / value
        if not name.startswith("forward"):
            streams = 2 if name.endswith("-guided") else 1
            row["to_forward"] = value / median[f"forward-b{batch}"]
            row["to_peak"] = value / (streams * batch * flops_per_image(flow.config) / peak)
        rival = f"ml-tarflow-b{batch}{'-guided' if name.endswith('-guided') else ''}"
        if name.startswith("ours") and rival in median:
            row["ratio"] = median[rival] / value
            row["largest_pixel_difference"] = float((kept[name] - kept[rival]).abs().max())
            row["largest_pixel"] = float(kept[rival].abs().max())
        rows.append(row)
        print(
            "  ".join(
                f"{key} {item:.4g}" if key != "name" else f"{item:32}"
                for key, item in row.items()
                if key != "all_seconds"
            )
        )
    return rows


def main() -> None:
    """Train or load the weights, time, write."""
    options = tyro.cli(Options)
    flow = trained_flow(options.steps, options.device)
    reference = None if options.reference is None else reference_model(options.reference, flow)
    clock = time.process_time if options.process_time else time.perf_counter
    peak = matmul_peak(flow.device, clock)
    print(f"{flow.device}, {torch.get_num_threads()} threads, matrix product {peak / 1e9:.0f} GFLOP/s")
    rows = [row for batch in options.batches for row in time_batch(flow, reference, options, batch, peak)]
    settings = {**dataclasses.asdict(options), "model": dataclasses.asdict(MODEL)}
    write_rows(options.json, flow.device, rows, settings=settings, peak_flops=peak)


if __name__ == "__main__":
    main()
