"""``flowback probe``: what each block and layer knows of the classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowback.checked import to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import out_folder, parse
from flowback.config import DataConfig
from flowback.task_config import ProbeConfig

if TYPE_CHECKING:
    from flowback.data.image_set import ImageSet
    from flowback.evaluation.linear_probe import LocationProbe, Probe

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Linear probe, nearest neighbours and alignment with an encoder, at every (block, layer)."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, a run's folder (its newest checkpoint), or a name (`fashion`, `owner/name`)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images; those of the checkpoint unless given. `--data NAME` or `--data FOLDER` for short."""
    probe: Annotated[ProbeConfig, tyro.conf.arg(name="")] = field(default_factory=ProbeConfig)
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    out: Path | None = None
    """Folder of the report and the plot; by default `evaluation` in the checkpoint's folder, or
    `evaluation/NAME` for a flow by name."""
    json: Path | None = None
    """Also write the report to this file."""


def run(argv: list[str]) -> None:
    """Probe, show, plot, write."""
    options = parse(Options, argv, "probe")
    from flowback.devices import pick_device
    from flowback.evaluation.held_out import run_images
    from flowback.evaluation.linear_probe import probe
    from flowback.evaluation.plots import plot_probe
    from flowback.evaluation.report import Report, weights_of
    from flowback.model import Flow
    from flowback.provenance import environment

    folder = out_folder(options.out, options.checkpoint)
    flow = Flow.from_pretrained(options.checkpoint, pick_device(options.device, "--device"))
    train, test = (run_images(flow, split, options.data) for split in ("train", "test"))
    result = probe(flow, train, test, config=options.probe, progress=True)
    plot_probe(result, folder / "probe.png")
    settings = {
        **weights_of(flow),
        "data": to_dict(options.data),
        "train": _about(train, result.train_images),
        "test": _about(test, result.test_images),
        "encoder": options.probe.encoder,
        "seed": options.probe.seed,
    }
    figures = {
        "best_linear": result.best.linear,
        "top1_gradient": result.top1_gradient,
        "locations": {_name(row): _figures(row) for row in result.locations},
    }
    report = Report("probe", figures, settings, environment=environment(flow.device))
    for path in (folder / "probe.json", options.json):
        if path is not None:
            report.save(path)
    _show(result, test.name, options.probe.encoder)
    say(f"Plot and report: {folder}")


def _show(result: Probe, images: str, encoder: str | None) -> None:
    rows = [[_name(row), 100 * row.linear, row.penalty, 100 * row.knn, row.cknna] for row in result.locations]
    columns = ["block.layer", "linear probe (%)", "C", "neighbours (%)", f"CKNNA, {encoder}"]
    show_table(f"{images}, {result.test_images} images", columns, rows)
    block, layer = result.best.location
    say(f"Best: block {block}, layer {layer} with {result.best.linear:.1%}.")
    if result.top1_gradient is not None:
        say(f"Training-free classification, gradient rule: {result.top1_gradient:.1%}.")


def _about(images: ImageSet, count: int) -> dict[str, object]:
    return {"images": images.name, "images_hash": images.fingerprint, "count": count}


def _name(row: LocationProbe) -> str:
    return ".".join(map(str, row.location))


def _figures(row: LocationProbe) -> dict[str, float | None]:
    return {name: value for name, value in asdict(row).items() if name != "location"}
