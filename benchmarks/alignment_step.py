"""Time and memory of one training step under every alignment strategy, and the error of every order.

    python benchmarks/alignment_step.py --json out.json --plot docs/figures/error_by_order.svg

A flow of 8 blocks of 4 layers, width 256, on 64 x 64 images in 256 tokens; the last two blocks aligned at
layer 3; targets of 384 dimensions, made before. Each row is a whole step, forward and backward of both
losses, and `ratio` is the median over the turns of its time to that of the plain step `none` beside it.
Three rows decode under autograd: `sequential` is the naive form, the block's forward pass anew for each
token; `sequential-prefix` runs it on the known tokens only; `sequential-cached` keeps keys and values. The
naive form takes 8 GB for each image.

With `--preset digits`, or another preset with alignment, flow, images, batch, locations and tolerance are the
preset's; `--width` and `--locations` change them. Of those that decode, `sequential-cached` alone is there.

On the CPU, `exact` is a back substitution in compiled code; `reverse-exact-products` is the way of all other
devices: products until the remainder is small.

The flow is trained for a moment first, on crops of scikit-learn's two photographs: the terms that `exact`
takes, and the error of a truncated series, depend on the flow. Errors are relative, in the 2-norm, over
the parameters of each aligned block, of the alignment's gradient alone, against the complete series.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor

from flowback import AlignmentConfig, Flow, FlowOutput, ModelConfig, RunConfig, get_preset, load_images
from flowback.alignment import back_substitution
from flowback.alignment.loss import Projector, alignment_loss
from flowback.alignment.strategies import encode
from flowback.data.pixels import to_unit_range
from flowback.flow.likelihood import nll_per_dim
from flowback.nn.patch import patchify
from flowback.provenance import environment
from harness import interleave, peak_bytes, peak_in_fresh_process, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import decode_with_autograd, decode_with_autograd_and_cache  # type: ignore[import-not-found]

LARGE = RunConfig(
    model=ModelConfig(image_size=64, patch_size=4, width=256, blocks=8, layers=4, num_classes=2),
    alignment=AlignmentConfig(locations=((7, 3), (8, 3)), hidden=256, weight=0.1),
)
DIM = 384
LR = 2e-4
STEPS: dict[str, dict] = {
    "none": {"strategy": "none"},
    "forward": {"strategy": "forward"},
    "detach": {"strategy": "detach"},
    "reverse-0": {"strategy": "reverse", "order": 0},
    "reverse-2": {"strategy": "reverse", "order": 2},
    "reverse-exact": {"strategy": "reverse", "order": "exact"},
    "reverse-exact-products": {"strategy": "reverse", "order": "exact"},
}
SEQUENTIAL: dict[str, Callable] = {
    "sequential": partial(decode_with_autograd, whole=True),
    "sequential-prefix": decode_with_autograd,
    "sequential-cached": decode_with_autograd_and_cache,
}
LIBRARIES = (back_substitution.library, lambda: None)
"""With the compiled code, and without it."""
ORDERS = (0, 1, 2, 4, 8, 16, 32, "exact")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def configured(options: argparse.Namespace) -> RunConfig:
    """The large flow, or that of a preset; with changes."""
    config = LARGE
    if options.preset:
        config = get_preset(options.preset).config
        config = replace(config, model=replace(config.model, num_classes=10))
    if options.width:
        config = replace(config, model=replace(config.model, width=options.width))
    if options.locations:
        pairs = tuple(zip(options.locations[::2], options.locations[1::2], strict=True))
        config = replace(config, alignment=replace(config.alignment, locations=pairs))
    return config


class Setting:
    """The flow, the projector and a batch, all from one seed."""

    def __init__(self, config: RunConfig, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.model = config, config.model
        self.flow = Flow(self.model).to(device)
        self.projector = Projector(self.model.width, config.alignment.hidden, DIM).to(device)
        self.features = torch.randn(self.model.token_dim, DIM, device=device)
        self.device = device
        if config.data.name == LARGE.data.name and self.model.image_size == 64:
            photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
            self.photographs = [to_unit_range(image.to(device)) for image in photographs]
        else:
            self.photographs = []
            self.set = load_images(config.data, self.model.image_size, self.model.channels)
        self.draw(batch)

    def draw(self, batch: int) -> None:
        """Images with TARFlow's noise: crops whose label is the photograph, or a preset's own.

        The targets look at clean patches.
        """
        if self.photographs:
            self.labels = torch.arange(batch, device=self.device) % 2
            clean = torch.stack([self._crop(self.photographs[label]) for label in self.labels.tolist()])
        else:
            chosen = torch.randint(len(self.set), (batch,))
            assert self.set.labels is not None
            self.labels = self.set.labels[chosen].to(self.device)
            clean = to_unit_range(self.set.read(chosen).to(self.device))
        self.images = clean + self.model.noise_std * torch.randn_like(clean)
        self.targets = torch.tanh(patchify(clean, self.model.patch_size) @ self.features)

    @staticmethod
    def _crop(photograph: Tensor) -> Tensor:
        top, left = (int(torch.randint(n - 64, ())) for n in photograph.shape[1:])
        return photograph[:, top : top + 64, left : left + 64]

    def parameters(self) -> list[Tensor]:
        """Of the flow and of the projector."""
        return [*self.flow.parameters(), *self.projector.parameters()]

    def likelihood(self, out: FlowOutput) -> Tensor:
        """Nats per dimension."""
        return nll_per_dim(out.log_prob.mean(), self.model.dims)

    def alignment(self, hidden: dict) -> Tensor:
        """With its weight."""
        return self.config.alignment.weight * alignment_loss(hidden, self.targets, self.projector).loss

    def encode(self, **options) -> FlowOutput:
        """The encode pass under a strategy."""
        config = replace(self.config.alignment, **options)
        return encode(self.flow, self.images, self.labels, None, config)

    def hidden(self, name: str) -> tuple[FlowOutput, dict]:
        """The encode pass, and hidden states in the graph of the named row."""
        if name in STEPS:
            out = self.encode(**STEPS[name])
            return out, out.hidden
        out = self.flow(self.images, self.labels)
        return out, SEQUENTIAL[name](
            self.flow, out.z.detach(), self.labels, None, self.config.alignment.locations
        )

    def step(self, name: str) -> None:
        """One training step, short of the optimiser."""
        for parameter in self.parameters():
            parameter.grad = None
        with mock.patch.object(back_substitution, "library", LIBRARIES[name.endswith("-products")]):
            out, hidden = self.hidden(name)
            loss = self.likelihood(out)
            (loss + self.alignment(hidden) if hidden else loss).backward()

    def train(self, steps: int, batch: int) -> None:
        """A moment of training, so that blocks predict and features align."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=1e-4)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (step + 1) / 20)
            self.draw(batch)
            self.step("detach")
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0:
                with torch.no_grad():
                    nll = self.likelihood(self.flow(self.images, self.labels))
                print(f"  step {step}: {float(nll):.3f} nats per dimension", flush=True)

    def block_gradients(self, hidden: dict) -> dict[int, Tensor]:
        """The alignment's gradient in the aligned blocks, one vector each."""
        blocks = {t: list(self.flow.blocks[t - 1].parameters()) for t, _ in self.config.alignment.locations}
        flat = [parameter for own in blocks.values() for parameter in own]
        found = torch.autograd.grad(self.alignment(hidden), flat, allow_unused=True, materialize_grads=True)
        rest = iter(found)
        return {t: torch.cat([next(rest).flatten() for _ in own]) for t, own in blocks.items()}

    def errors(self) -> list[dict]:
        """Relative error of every order's gradient, against the series run to its end."""
        truth = self.block_gradients(self.encode(strategy="reverse", order="exact", tolerance=1e-6).hidden)

        def row(order: object, hidden: dict) -> dict:
            found = self.block_gradients(hidden)
            error = {f"block_{t}": float((found[t] - truth[t]).norm() / truth[t].norm()) for t in truth}
            return {"order": order, **error}

        return [
            row("detach", self.encode(strategy="detach").hidden),
            *(row(order, self.encode(strategy="reverse", order=order).hidden) for order in ORDERS),
            row("sequential", self.hidden("sequential-cached")[1]),
        ]


def ratio(seconds: list[float], plain: list[float]) -> float:
    """Median over the turns, each against the plain step beside it: slow drifts of the machine drop out.

    What ran in one turn only stands against all plain steps.
    """
    if len(seconds) < len(plain):
        return statistics.median(seconds) / statistics.median(plain)
    return statistics.median(own / other for own, other in zip(seconds, plain, strict=True))


def show(rows: list[dict], columns: dict[str, str]) -> None:
    """Print the chosen columns, numbers in their format."""
    table = Table(*columns)
    for row in rows:
        table.add_row(
            *(str(row[name]) if form == "" else format(row[name], form) for name, form in columns.items())
        )
    Console().print(table)


def plot(path: Path, errors: list[dict], environment: dict) -> None:
    """Error by order, one line a block; detach as a level."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    numbered = [row for row in errors if isinstance(row["order"], int)]
    blocks = [name for name in errors[0] if name != "order"]
    for color, name in zip(("C0", "C1"), blocks, strict=False):
        label = name.replace("_", " ")
        axes.plot(
            [row["order"] for row in numbered],
            [row[name] for row in numbered],
            "o-",
            color=color,
            label=label,
        )
        axes.axhline(errors[0][name], color=color, linestyle=":", label=f"{label}, detach")
    axes.set(yscale="log", xlabel="order", ylabel="relative error of the alignment's gradient")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.2)
    axes.set_xticks([row["order"] for row in numbered], [str(row["order"]) for row in numbered])
    axes.minorticks_off()
    axes.set_title(environment["device"], fontsize=7)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Train, measure errors, memory and time, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--plot", type=Path, help="draw error by order here; with --from, only that")
    parser.add_argument("--from", type=Path, dest="source", help="take the numbers from this JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="take flow, images, batch and alignment from this preset")
    parser.add_argument("--width", type=int, help="of the flow, in place of its own")
    parser.add_argument(
        "--locations", type=int, nargs="+", help="block and layer of each, in place of its own"
    )
    parser.add_argument("--batch", type=int, help="images in a step; 1, or the preset's")
    parser.add_argument("--repeats", type=int, default=21, help="turns of the timing")
    parser.add_argument("--train-steps", type=int, default=60, help="of 8 images each")
    parser.add_argument("--state", type=Path, help="the trained weights: read if there, else written")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each row")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of the process")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.source:
        measured = json.loads(options.source.read_text())
        plot(options.plot, measured["errors"], measured["environment"])
        return
    config = configured(options)
    batch = options.batch or (config.train.batch_size if options.preset else 1)
    setting = Setting(config, batch, device)
    sequential = {"sequential-cached": SEQUENTIAL["sequential-cached"]} if options.preset else SEQUENTIAL
    if options.peak_of:
        print(peak_bytes(lambda: setting.step(options.peak_of), device))
        return

    print(f"device: {environment(device)['device']}, batch {batch}, clock: {options.clock}")
    if options.state and options.state.exists():
        state = torch.load(options.state, map_location=device)
        setting.flow.load_state_dict(state["flow"])
        setting.projector.load_state_dict(state["projector"])
    else:
        setting.train(options.train_steps, batch if options.preset else 8)
        if options.state:
            torch.save(
                {"flow": setting.flow.state_dict(), "projector": setting.projector.state_dict()},
                options.state,
            )
    torch.manual_seed(1)
    setting.draw(batch)
    errors = setting.errors()
    show(errors, {name: "" if name == "order" else ".1e" for name in errors[0]})
    peaks = {
        name: peak_in_fresh_process(["--peak-of", name, *sys.argv[1:]])
        for name in ([] if options.no_memory else [*STEPS, *sequential])
    }
    print("timing", flush=True)
    calls = {name: partial(setting.step, name) for name in [*STEPS, *sequential]}
    seconds = interleave(calls, device, options.repeats, once=sequential, clock=CLOCKS[options.clock])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "name": name,
            "seconds": medians[name],
            "ratio": ratio(seconds[name], seconds["none"]),
            **({"peak_bytes": peaks[name]} if peaks else {}),
            "turns": len(seconds[name]),
            "fastest": min(seconds[name]),
            "slowest": max(seconds[name]),
        }
        for name in calls
    ]
    memory = {"peak_bytes": ","} if peaks else {}
    show(rows, {"name": "", "seconds": ".4f", "ratio": ".2f", **memory, "turns": ""})
    if options.json:
        settings = {"batch": batch, "train_steps": options.train_steps, "clock": options.clock}
        settings |= {"model": asdict(config.model), "alignment": asdict(config.alignment)}
        write_rows(options.json, device, rows, settings=settings, errors=errors)
    if options.plot:
        plot(options.plot, errors, environment(device))


if __name__ == "__main__":
    main()
