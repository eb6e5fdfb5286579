"""Settings that run anywhere: digits, folders of photographs, and small siblings of the papers' rows."""

from __future__ import annotations

from dataclasses import replace

from flowback.config import AlignmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from flowback.presets.preset import Preset

__all__ = ["SMALL", "mini"]

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


def _aligned(base: RunConfig) -> RunConfig:
    return replace(base, alignment=replace(base.alignment, strategy="reverse", order="exact"))


SMALL = {
    "digits": Preset(_DIGITS, "scikit-learn's 8×8 digits, likelihood alone; about two minutes on two cores"),
    "digits-reverse": Preset(_aligned(_DIGITS), "the same with exact reverse alignment"),
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
        _aligned(_PHOTOS),
        "a folder of images at 32×32 with reverse alignment",
    ),
}


def mini(name: str, preset: Preset) -> Preset:
    """The small sibling: the same strategy, blocks, relative depth, noise and share of steps, on digits.

    4 blocks of 4 layers stand for 8 of 8, EfficientNet-Lite0 for any encoder; latents become pixels.
    """
    config, small = preset.config, _DIGITS
    model, latent = config.model, config.codec.vae is not None
    # Blocks 1, 2 and 7, 8 stay next to the data and next to the noise; all become all.
    several = len(config.alignment.locations) > 2
    locations = dict.fromkeys(
        ((t + 1) // 2 if several else t if t <= 2 else t - 4, layer // 2)
        for t, layer in config.alignment.locations
    )
    return Preset(
        RunConfig(
            model=replace(
                small.model,
                image_size=8 if latent else model.image_size // 8,
                patch_size=model.patch_size if latent else model.patch_size // 2,
                layers=4,
                mlp=model.mlp,
                position=model.position,
                noise_std=small.model.noise_std * model.noise_std / (0.2 if latent else 0.05),
                num_classes=0 if model.num_classes == 0 else None,
            ),
            data=small.data,
            alignment=replace(
                config.alignment, encoder=small.alignment.encoder, hidden=128, locations=tuple(locations)
            ),
            train=replace(
                small.train, steps=600 * config.train.steps // 400_000, eval_every=300, save_every=300
            ),
        ),
        f"{name} on 8×8 digits" if model.image_size != 128 else f"{name} on digits",
    )
