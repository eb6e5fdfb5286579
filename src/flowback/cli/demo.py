"""``flowback demo``: the whole job on real digits, without and with reverse alignment, and a report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowback.checked import to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.errors import InputError
from flowback.files import check_folder, replacing, write_json
from flowback.presets import get_preset

if TYPE_CHECKING:
    from flowback.evaluation.judge import Judge
    from flowback.model import Flow
    from flowback.training import TrainResult

__all__ = ["Options", "run"]

RUNS = {"none": ("digits", "likelihood alone"), "reverse": ("digits-reverse", "exact reverse alignment")}
COLUMNS = (
    "nll",
    "top1_gradient",
    "top1_normalised",
    "top1_exhaustive",
    "fd_efficientnet_lite0",
    "seconds",
    "images_per_second",
)


@dataclass(frozen=True)
class Options:
    """Draw with the flows that come along; then train on digits twice, without and with reverse alignment.

    Both runs start from the same seed. Takes about five minutes on two CPU cores. Run it again to continue
    where it stopped.
    """

    out: Path = Path("runs/demo")
    """Folder of the two runs, the pictures and the report."""
    steps: int | None = None
    """Training steps of each run; the preset's if left out."""
    seed: int = 0
    """Seed of both runs."""
    samples: int = 1000
    """Samples of each run for the Fréchet distance."""
    guidance: float = 0.3
    """Guidance of the samples; 0 is off."""
    json: Path | None = None
    """Also write the report to this file."""

    def check(self) -> None:
        """Raise InputError for numbers out of range; not on construction, whose errors tyro frames."""
        if self.steps is not None and self.steps < 1:
            raise InputError("--steps must be at least 1.")
        if not 2 <= self.samples <= 2**32:
            raise InputError("--samples must be at least 2: a covariance needs two.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} is out of range; it goes from 0 to {2**63 - 1}.")
        if not math.isfinite(self.guidance):
            raise InputError("--guidance must be a finite number.")
        check_folder(self.out, "--out")


def run(argv: list[str]) -> None:
    """Train twice, compare, and say where to look."""
    options = parse(Options, argv, "demo")
    options.check()
    from flowback.alignment.encoders import create_encoder
    from flowback.evaluation.judge import Judge
    from flowback.evaluation.references import Reference
    from flowback.provenance import environment

    _draw_packaged(options.out)
    results = {name: _train(name, options) for name in RUNS}
    images = results["none"].images  # both runs have the same
    judge = Judge(Reference(images.name, images.fingerprint, images), create_encoder("efficientnet_lite0"))
    report: dict[str, Any] = {
        "runs": {name: _figures(result, judge, options) for name, result in results.items()},
        "settings": {
            "seed": options.seed,
            "samples": options.samples,
            "guidance": options.guidance,
            "denoise": True,
            "nll": "nats per dimension of the noised test images, given their labels",
            "fd_efficientnet_lite0": "of the samples against the training images",
            "configs": {name: to_dict(result.config) for name, result in results.items()},
        },
        "environment": environment(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    _draw_samples({name: result.flow for name, result in results.items()}, options)
    _draw_curves(options.out)
    for file in (options.out / "report.json", *((options.json,) if options.json else ())):
        write_json(file, report)
    with replacing(options.out / "report.md") as file:
        file.write(_markdown(report))
    rows = [[name, *(report["runs"][name][column] for column in COLUMNS)] for name in RUNS]
    show_table("Digits, test images", ["run", *(column.replace("_", " ") for column in COLUMNS)], rows)
    say(f"Look at {options.out}/samples.png, curves.png and report.md")


def _draw_packaged(out: Path) -> None:
    """fashion.png: what the flows that come with the package draw, before anything is trained."""
    from flowback.checkpoint import packaged
    from flowback.model import Flow

    flows = {name: Flow.from_pretrained(name) for name in packaged()}
    for name, flow in flows.items():
        say(f"{name}: {flow.about}")
    title = "Flows that come with flowback, one class in each row, guidance 1"
    _draw_grids(flows, out / "fashion.png", title, columns=6, guidance=1.0, enlarged=2)
    say(f"Look at {out}/fashion.png, which they drew. Now two flows are trained on digits.")


def _train(name: str, options: Options) -> TrainResult:
    from flowback.training import train

    preset, about = RUNS[name]
    config = get_preset(preset).config
    steps = options.steps or config.train.steps
    config = replace(config, train=replace(config.train, steps=steps, seed=options.seed, device="cpu"))
    return train(config, out=options.out / name, description=f"{name}: {about}")


def _figures(result: TrainResult, judge: Judge, options: Options) -> dict[str, float]:
    """Likelihood, accuracy, speed and samples of one run."""
    from flowback.data.pixels import to_bytes
    from flowback.evaluation.held_out import held_out_figures
    from flowback.sampling import sample

    assert result.test is not None
    labels = [index % len(result.images.classes) for index in range(options.samples)]
    drawn = to_bytes(sample(result.flow, labels, seeds=range(options.samples), guidance=options.guidance))
    quality = judge.figures(judge.gather(drawn.split(64), options.samples))
    held_out = held_out_figures(result.flow, result.test, len(result.test), exhaustive=True)
    seconds = result.metrics["seconds"]
    speed = {"seconds": seconds, "images_per_second": result.metrics["images"] / seconds}
    return {**quality, **held_out, **speed}


def _draw_samples(flows: dict[str, Flow], options: Options) -> None:
    """samples.png: both runs from the same noise."""
    titled = {RUNS[name][1]: flow for name, flow in flows.items()}
    title = f"Samples, one class in each row, guidance {options.guidance:g}"
    file = options.out / "samples.png"
    _draw_grids(titled, file, title, columns=10, guidance=options.guidance, enlarged=8)


def _draw_grids(
    flows: dict[str, Flow], file: Path, title: str, *, columns: int, guidance: float, enlarged: int
) -> None:
    """Samples of flows side by side from the same noise, classes in rows."""
    from torch.nn import functional

    from flowback.sampling import sample
    from flowback.sampling.image_files import grid

    plt = _pyplot()
    figure, axes = plt.subplots(1, len(flows), figsize=(10, 5.4), layout="constrained", squeeze=False)
    for axis, (name, flow) in zip(axes[0], flows.items(), strict=True):
        labels = [k for k in range(10) for _ in range(columns)]
        drawn = sample(flow, labels, seeds=range(len(labels)), guidance=guidance)
        # 8 pixels are hard to read
        shown = functional.interpolate(drawn, scale_factor=enlarged, mode="bicubic")
        picture = grid(shown, columns=columns, names=flow.classes)[0].numpy()
        axis.imshow(picture, cmap="gray", interpolation="nearest")
        axis.set_title(name)
        axis.set_axis_off()
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    """Matplotlib that draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_curves(out: Path) -> None:
    """curves.png: test nll and training-free accuracy against images seen."""
    from flowback.training.run_folder import read_rows

    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (_, about) in RUNS.items():
        rows = [row for row in read_rows(out / name / "metrics.jsonl") if "test_nll" in row]
        seen = [row["images"] for row in rows]
        left.plot(seen, [row["test_nll"] for row in rows], marker=".", label=about)
        right.plot(seen, [100 * row["test_top1_gradient"] for row in rows], marker=".", label=about)
    left.set(xlabel="images seen", ylabel="test nll (nats/dim)", title="Likelihood of the noised test images")
    right.set(
        xlabel="images seen", ylabel="accuracy (%)", title="Training-free classification, gradient rule"
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)


def _markdown(report: dict[str, Any]) -> str:
    """report.md: the figures, the pictures, and how to repeat them."""
    about = report["environment"]
    lines = [
        "# Digits: what reverse alignment changes",
        "",
        f"| run | {' | '.join(COLUMNS)} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, figures in report["runs"].items():
        lines.append(
            f"| {name} ({RUNS[name][1]}) | " + " | ".join(f"{figures[c]:.4g}" for c in COLUMNS) + " |"
        )
    settings = report["settings"]
    lines += [
        "",
        f"- nll: {settings['nll']}.",
        "- top1: share of the test images that the flow itself classifies, without a trained classifier.",
        f"- fd_efficientnet_lite0: Fréchet distance of {settings['samples']} samples "
        f"(guidance {settings['guidance']:g}, denoised) to the training images in "
        "EfficientNet-Lite0's features; not an FID.",
        f"- Seed {settings['seed']}; {about['device']}; torch {about['versions']['torch']}; "
        f"commit {about['commit'] or 'unknown'}; command `{about['command']}`.",
        "",
        "![Samples, classes in rows](samples.png)",
        "",
        "![Test nll and accuracy against images seen](curves.png)",
        "",
    ]
    return "\n".join(lines)
