"""``flowback prepare``: convert a data set to the training size, once; run again, it resumes or checks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.config import CodecConfig, Crop
from flowback.errors import InputError
from flowback.files import write_json

if TYPE_CHECKING:
    from flowback.data.columns import Maker
    from flowback.data.image_set import FeatureSettings
    from flowback.data.vae import Vae

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Write images of one size, labels and names into a few files that training maps into memory.

    Run the same command again to continue where it stopped; for a complete set it checks that the source and
    all written bytes are unchanged. Train with `--data.path OUT`.
    """

    data: tyro.conf.Positional[str]
    """A folder of images (one sub-folder per class), a folder of tar shards (webdataset) or one shard,
    `hf:NAME` or a folder saved by Hugging Face `datasets`, or digits, mnist, fashion-mnist, kmnist,
    emnist, cifar10, cifar100, emoji, fake."""
    out: Annotated[Path, tyro.conf.arg(help_behavior_hint="")]
    """The prepared set's folder."""
    image_size: int = 64
    """Height and width of the prepared images."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB."""
    crop: Crop = "adm"
    """`adm`: ADM's, as in published references; `tarflow`: TARFlow's, bilinear; `bicubic`: as when training
    from a folder."""
    holdout: float = 0.1
    """Share kept for evaluation if the source has no `train` and `test` (or `val`); 0 keeps none."""
    labels: Path | None = None
    """CSV file of lines `image,class`, for images that are not in class folders."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """What to do with images that cannot be read: stop with their names, or leave them out and say so."""
    path: Path | None = None
    """Folder with the files of a named set."""
    download: bool = False
    """Download a named set if its files are not there."""
    vae: str | None = None
    """Also write latents of this AutoencoderKL or AutoencoderTiny: a folder, or a name on the hub."""
    vae_revision: str | None = None
    """Revision of the VAE on the hub."""
    vae_scale: float | None = None
    """Factor of the latents; None: the `scaling_factor` of the VAE's own config."""
    vae_shift: float | None = None
    """Subtracted from the latents before they are scaled; None: the VAE's own `shift_factor`."""
    encoder: str | None = None
    """Also write this encoder's patch features, for alignment; names as in `--alignment.encoder`."""
    encoder_grid: int | None = None
    """Patches along one side: the model's tokens (size over patch size), or its `--alignment.grid`."""
    encoder_weights: Path | None = None
    """Local file of the encoder's weights, instead of a download; training then needs it too."""
    device: str = "auto"
    """Where VAE and encoder compute: `auto`, `cpu`, `cuda`, ..."""
    workers: int | None = None
    """Processes that decode; None: one per core, 0: only this one."""
    json: Path | None = None
    """Write counts, hashes and images/s to this file."""

    def check(self) -> None:
        """Raise InputError for numbers out of range; not on construction, whose errors tyro frames."""
        if self.image_size < 1:
            raise InputError("--image-size must be at least 1.")
        if not 0 <= self.holdout < 1:
            raise InputError("--holdout must be in [0, 1); 0 keeps no test images.")
        if (self.encoder is None) != (self.encoder_grid is None):
            raise InputError(
                "--encoder and --encoder-grid go together; the grid is the model's tokens along one side: "
                "its image size over its patch size."
            )
        if self.encoder_weights is not None and self.encoder is None:
            raise InputError("--encoder-weights needs --encoder, the encoder's name.")
        if self.encoder_grid is not None and self.encoder_grid < 1:
            raise InputError("--encoder-grid must be at least 1.")
        if self.workers is not None and self.workers < 0:
            raise InputError("--workers must not be negative.")


def run(argv: list[str]) -> None:
    """Prepare, check, report."""
    options = parse(Options, argv, "prepare")
    options.check()
    from flowback.data.decode_pool import Settings
    from flowback.data.pixels import note_sentence
    from flowback.data.prepared_writer import prepare
    from flowback.data.sources import open_source
    from flowback.devices import cpu_cores, pick_device
    from flowback.provenance import environment

    pick_device(options.device, "--device")
    started = time.perf_counter()
    sources = open_source(
        options.data, options.image_size, options.channels, options.holdout, options.labels, options.path,
        options.download,
    )  # fmt: skip
    codec, latent = _codec(options)
    encoder, features = _encoder(options)
    settings = Settings(
        options.image_size, options.channels, options.crop, options.holdout,
        None if codec is None else codec.config, latent, features,
    )  # fmt: skip
    workers = cpu_cores() if options.workers is None else options.workers
    complete = (options.out / "prepared.json").is_file()
    summary = prepare(
        sources, options.out, options.data, settings, options.bad_images, workers, codec, encoder
    )
    seconds = time.perf_counter() - started
    rows = [
        [split, part["images"], len(summary["classes"]), len(part["skipped"]), part["fingerprint"]]
        for split, part in summary["splits"].items()
    ]
    show_table(str(options.out), ["split", "images", "classes", "skipped", "content hash"], rows)
    skipped = [name for part in summary["splits"].values() for name in part["skipped"]]
    if skipped:
        say(f"Left out: {', '.join(skipped[:8])}{', ...' if len(skipped) > 8 else ''}")
    for split, part in summary["splits"].items():
        for note, counted in part.get("noted", {}).items():
            say(note_sentence(note, counted["images"], part["images"], counted["first"], split))
    if complete:
        say("The set was complete; the source and every byte are unchanged.")
    shape = f" --model.channels {latent[0]} --model.image-size {latent[1]}" if latent else ""
    aligned = f" --alignment.encoder {options.encoder}" if options.encoder else ""
    say(f"Train with: flowback train PRESET --data.path {options.out}{shape}{aligned}")
    if options.json:
        images = sum(part["images"] for part in summary["splits"].values())
        record = {"environment": environment(), "set": summary, "seconds": seconds}
        write_json(options.json, {**record, "images_per_second": images / seconds})


def _codec(options: Options) -> tuple[Vae | None, tuple[int, int, int] | None]:
    """The VAE, and the shape of its latents."""
    if options.vae is None:
        return None, None
    import torch

    from flowback.data.vae import Vae, open_codec
    from flowback.devices import pick_device

    size = options.image_size
    config = CodecConfig(
        options.vae, options.vae_revision, None, options.vae_scale, options.vae_shift, image_size=size
    )
    codec = open_codec(config, pick_device(options.device, "--device"))
    assert isinstance(codec, Vae)
    used_scaling = (codec.scale, codec.shift)
    for what, used, own in zip(("scale", "shift"), used_scaling, codec.own_scaling, strict=True):
        if used != own:
            say(f"--vae-{what} {used:g} replaces the VAE's own, {own:g}.")
    channels, height, width = codec.encode(torch.zeros(1, options.channels, size, size)).shape[2:]
    return codec, (channels, height, width)


def _encoder(options: Options) -> tuple[Maker | None, FeatureSettings | None]:
    """The encoder's features of images, and what decides them."""
    if options.encoder is None or options.encoder_grid is None:
        return None, None
    from flowback.alignment.encoders import create_encoder, weights_file_hash
    from flowback.data.image_set import FeatureSettings
    from flowback.devices import pick_device

    grid, file = options.encoder_grid, weights_file_hash(options.encoder_weights)
    device = pick_device(options.device, "--device")
    encoder = create_encoder(options.encoder, options.encoder_weights).to(device)
    settings = FeatureSettings(
        options.encoder, file, encoder.fingerprint, grid, encoder.input_size(grid), encoder.dim
    )
    return lambda images: encoder(images.to(device), grid), settings
