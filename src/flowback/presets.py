"""Complete settings by name: small ones that run anywhere, and those of the papers with their numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flowback.config import AlignmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from flowback.errors import InputError, nearest

__all__ = ["PRESETS", "Preset", "get"]


@dataclass(frozen=True)
class Preset:
    """A row: settings, where they come from, and what they gave."""

    config: RunConfig
    about: str
    published: dict[str, float] = field(default_factory=dict)
    """Numbers of the paper, by metric."""
    measured: str = "none yet"
    """What this library measured, with device and seed."""


_DIGITS = RunConfig(
    model=ModelConfig(
        image_size=8, channels=1, patch_size=2, width=64, blocks=4, layers=2, head_dim=32, noise_std=0.1
    ),
    data=DataConfig(name="digits"),
    alignment=AlignmentConfig(locations=((3, 2), (4, 2)), hidden=128, tolerance=0.01),
    train=TrainConfig(
        steps=1200,
        batch_size=64,
        label_drop=0.02,
        lr=2e-3,
        min_lr=1e-5,
        warmup_steps=50,
        ema_decay=0.99,
        grad_clip=1.0,
        log_every=50,
        eval_every=100,
        save_every=200,
        eval_images=360,
    ),
)

_PHOTOS = RunConfig(
    model=ModelConfig(image_size=32, patch_size=4, width=192, blocks=4, layers=3, head_dim=32, noise_std=0.1),
    data=DataConfig(name="folder", flip=True),
    alignment=AlignmentConfig(locations=((3, 2), (4, 2)), hidden=256),
    train=TrainConfig(
        steps=2000,
        batch_size=64,
        lr=1e-3,
        warmup_steps=100,
        ema_decay=0.99,
        grad_clip=1.0,
        log_every=20,
        eval_every=200,
        save_every=200,
        eval_images=256,
    ),
)

_IMAGENET64 = RunConfig(
    model=ModelConfig(num_classes=1000),
    data=DataConfig(name="folder", flip=True, workers=8),
    alignment=AlignmentConfig(encoder="timm:vit_base_patch14_dinov2.lvd142m"),
    train=TrainConfig(precision="bf16"),
)


def _with(base: RunConfig, **alignment: object) -> RunConfig:
    return replace(base, alignment=replace(base.alignment, **alignment))  # type: ignore[arg-type]


PRESETS: dict[str, Preset] = {
    "digits": Preset(_DIGITS, "scikit-learn's 8×8 digits, likelihood alone; about two minutes on two cores"),
    "digits-reverse": Preset(
        _with(_DIGITS, strategy="reverse", order="exact"), "the same with exact reverse alignment"
    ),
    "digits-mini": Preset(
        replace(
            _DIGITS,
            model=replace(_DIGITS.model, width=32, blocks=2, layers=1),
            alignment=replace(_DIGITS.alignment, locations=((2, 1),)),
            train=replace(_DIGITS.train, steps=1500, log_every=25, save_every=100, eval_every=500),
        ),
        "a flow that trains in about 30 s on one core and saves every few seconds; for fault tests",
    ),
    "folder-32": Preset(_PHOTOS, "a folder of images at 32×32 (--data.path), likelihood alone"),
    "folder-32-reverse": Preset(
        _with(_PHOTOS, strategy="reverse", order="exact"),
        "a folder of images at 32×32 with reverse alignment",
    ),
    "imagenet64": Preset(
        _IMAGENET64,
        "ImageNet 64×64, likelihood alone (arXiv 2511.22345, Table 1)",
        {"fid": 12.91, "sfid": 33.79, "is": 36.62, "top1": 37.43},
    ),
    "imagenet64-reverse": Preset(
        _with(_IMAGENET64, strategy="reverse", order=0),
        "ImageNet 64×64, reverse alignment of blocks 7 and 8, layer 6 (arXiv 2511.22345, Table 1)",
        {"fid": 11.71, "sfid": 33.68, "is": 44.31, "top1": 57.35},
    ),
}


def get(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]
