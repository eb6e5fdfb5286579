"""``flowback probe``: what each block and layer knows of the classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import tyro

from flowback.alignment.encoders import create_encoder
from flowback.checked import to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import held_out, out_folder, parse
from flowback.config import DataConfig
from flowback.data.image_set import ImageSet, evenly
from flowback.devices import pick_device
from flowback.errors import InputError
from flowback.evaluation.held_out import topk_accuracy
from flowback.evaluation.linear_probe import Probe, all_locations, encoder_features, features, probe
from flowback.evaluation.plots import plot_probe
from flowback.evaluation.report import make_record, weights_of
from flowback.files import write_json
from flowback.model import Flow

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Linear probe, nearest neighbours and alignment with an encoder, at every (block, layer)."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images; those of the checkpoint unless given. `--data NAME` or `--data FOLDER` for short."""
    locations: tuple[tuple[int, int], ...] = ()
    """(block, layer) pairs, counted from 1; none given: all."""
    train_limit: int | None = 5000
    """Training images, at most, spread evenly."""
    test_limit: int | None = None
    """Test images, at most, spread evenly."""
    encoder: str | None = "efficientnet_lite0"
    """Encoder of the CKNNA column: `efficientnet_lite0`, `timm:NAME`, or None for no such column."""
    encoder_weights: Path | None = None
    """Local file of the encoder's weights, in place of a download."""
    seed: int = 0
    """Seed of the noise on the images, and of the split that chooses the penalty."""
    batch_size: int = 64
    """Images at once."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    out: Path | None = None
    """Folder of the record and the plot; by default `evaluation` in the checkpoint's folder."""
    json: Path | None = None
    """Also write the record to this file."""

    def check(self) -> None:
        """Raise InputError for numbers out of range; not on construction, whose errors tyro frames."""
        if min(self.batch_size, *(n for n in (self.train_limit, self.test_limit) if n is not None)) < 1:
            raise InputError("--batch-size, --train-limit and --test-limit must be at least 1.")


def run(argv: list[str]) -> None:
    """Probe, show, plot, write."""
    options = parse(Options, argv, "probe")
    options.check()
    flow = Flow.from_pretrained(options.checkpoint, pick_device(options.device, "--device"))
    train, test = (held_out(options.data, flow.config, split) for split in ("train", "test"))
    locations = list(options.locations) or all_locations(flow)
    sides, labels = [], []
    for images, limit in ((train, options.train_limit), (test, options.test_limit)):
        labels.append(_labels(images, limit))
        sides.append(
            features(flow, images, locations, limit, options.seed, options.batch_size, progress=True)
        )
    aligned = None
    if options.encoder is not None:
        aligned = _aligned(options, test, flow.device)
    found = probe(sides[0], labels[0], sides[1], labels[1], aligned, options.seed, progress=True)
    free = None
    if flow.config.num_classes:
        free = topk_accuracy(
            flow, test, "gradient", options.test_limit, options.batch_size, seed=options.seed, progress=True
        ).top1
    settings = {
        **weights_of(options.checkpoint),
        "data": to_dict(options.data),
        "train": {"images": train.name, "images_hash": train.fingerprint, "count": len(labels[0])},
        "test": {"images": test.name, "images_hash": test.fingerprint, "count": len(labels[1])},
        "encoder": options.encoder,
        "seed": options.seed,
    }
    figures = {
        "best_linear": max(row.linear for row in found),
        "top1_gradient": free,
        "locations": {f"{row.location[0]}.{row.location[1]}": _without_location(row) for row in found},
    }
    record = make_record("probe", figures, settings, [], flow.device)
    folder = out_folder(options.out, options.checkpoint)
    plot_probe(found, free, folder / "probe.png")
    for path in (folder / "probe.json", options.json):
        if path is not None:
            write_json(path, record)
    rows = [
        [f"{row.location[0]}.{row.location[1]}", 100 * row.linear, row.penalty, 100 * row.knn, row.cknna]
        for row in found
    ]
    columns = ["block.layer", "linear probe (%)", "C", "neighbours (%)", f"CKNNA, {options.encoder}"]
    show_table(f"{test.name}, {len(labels[1])} images", columns, rows)
    best = max(found, key=lambda row: row.linear)
    say(f"Best: block {best.location[0]}, layer {best.location[1]} with {best.linear:.1%}.")
    if free is not None:
        say(f"Training-free classification, gradient rule: {free:.1%}.")
    say(f"Plot and record: {folder}")


def _labels(images: ImageSet, limit: int | None) -> torch.Tensor:
    if images.labels is None:
        raise InputError(f"{images.name} has no labels; a probe needs images sorted into class folders.")
    return images.labels[evenly(len(images), limit)]


def _aligned(options: Options, test: ImageSet, device: torch.device) -> torch.Tensor:
    encoder = create_encoder(options.encoder or "", options.encoder_weights).to(device)
    return encoder_features(encoder, test.in_pixels, options.test_limit, options.batch_size)


def _without_location(row: Probe) -> dict[str, float | None]:
    return {name: value for name, value in asdict(row).items() if name != "location"}
