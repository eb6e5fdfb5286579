"""The papers' rows: a table is a tuple of rows, and each row a preset.

All figures are the papers'. Where a row has none, or a table fewer rows than in the paper, the project does
not have them.
"""

from __future__ import annotations

from dataclasses import replace

from flowback.config import AlignmentConfig, CodecConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from flowback.presets.preset import Preset

__all__ = ["TABLES"]

_IMAGENET64 = RunConfig(
    model=ModelConfig(num_classes=1000),
    data=DataConfig(name="folder", flip=True, workers=8),
    alignment=AlignmentConfig(encoder="timm:vit_base_patch14_dinov2.lvd142m"),
    train=TrainConfig(precision="bf16"),
)

# The VAE's latents of 256×256 images: 4 channels of 32×32 (Table 6 of the paper).
_IMAGENET256 = replace(
    _IMAGENET64,
    model=ModelConfig(
        image_size=32,
        channels=4,
        patch_size=2,
        mlp="swiglu",
        position="rope",
        noise_std=0.2,
        num_classes=1000,
    ),
    data=DataConfig(name="prepared", flip=True),
    codec=CodecConfig(vae="stabilityai/sd-vae-ft-ema"),
)

_METRICS = ("fid", "sfid", "is", "top1")

# Strategy, blocks, layer; FID, sFID, IS, accuracy of training-free classification (%). 400k steps, 64×64.
_STRATEGIES = (
    ("none", "", 0, 12.91, 33.79, 36.62, 37.43),
    ("forward", "all", 2, 12.25, 37.97, 40.85, 46.97),
    ("detach", "all", 2, 12.19, 34.31, 41.98, 49.06),
    ("detach", "all", 4, 12.14, 33.97, None, 54.14),
    ("detach", "all", 6, 12.37, 34.32, None, 54.98),
    ("reverse", "all", 2, 12.21, 33.80, 42.08, 49.91),
    ("forward", "first", 2, 12.67, 39.99, 41.11, 61.16),
    ("detach", "first", 2, 12.73, 33.84, 37.81, 61.63),
    ("detach", "last", 2, 12.12, 34.00, 41.18, 55.14),
    ("reverse", "last", 2, 11.93, 33.78, 40.90, 55.21),
    ("reverse", "last", 4, 11.84, 33.61, 46.06, 58.91),
    ("reverse", "last", 6, 11.71, 33.68, 44.31, 57.35),
)
_BLOCKS = {"": (), "all": tuple(range(1, 9)), "first": (1, 2), "last": (7, 8)}

# Name, encoder; the same figures, for reverse alignment of blocks 7 and 8, layer 6.
_ENCODERS = (
    ("clip-b", "CLIP-B", "timm:vit_base_patch16_clip_quickgelu_224.openai", 12.41, 33.99, 41.99, 38.99),
    ("mae-b", "MAE-B (weights: CC BY-NC 4.0)", "timm:vit_base_patch16_224.mae", 12.32, 34.00, 39.69, 37.57),
    ("dinov2-l", "DINOv2-L", "timm:vit_large_patch14_dinov2.lvd142m", 11.74, 33.87, 45.00, 58.80),
)

# Size, strategy, thousands of steps; FID, accuracy. What else the row changes stands in its name.
_STEPS = (
    (64, "none", 1000, 11.76, 39.97),
    (64, "reverse", 600, 11.53, 57.75),
    (64, "reverse", 800, 11.48, 57.65),
    (64, "reverse", 1000, 11.25, 57.02),
    (256, "none", 1000, 13.05, 40.22),
    (256, "reverse", 1000, 12.79, 56.24),
)

# Patch, width, noise, classes of TARFlow's models [P-Ch-8-8-N(0, σ²)]; size and name.
_TARFLOW = (
    ("imagenet64", 64, 4, 1024, 0.05, 1000),
    ("imagenet64-uncond", 64, 2, 768, 0.05, 0),
    ("imagenet128", 128, 4, 1024, 0.15, 1000),
    ("afhq256", 256, 8, 768, 0.07, None),
)


def _with(base: RunConfig, **alignment: object) -> RunConfig:
    return replace(base, alignment=replace(base.alignment, **alignment))  # type: ignore[arg-type]


def _model(base: RunConfig, **model: object) -> RunConfig:
    return replace(base, model=replace(base.model, **model))  # type: ignore[arg-type]


def _figures(*values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(_METRICS, values, strict=True) if value is not None}


def _strategies() -> dict[str, Preset]:
    rows = {}
    for strategy, blocks, layer, *figures in _STRATEGIES:
        name, about = "imagenet64", "ImageNet 64×64, likelihood alone"
        config = _IMAGENET64
        if strategy != "none":
            main = (strategy, blocks, layer) == ("reverse", "last", 6)
            name = "imagenet64-reverse" if main else f"imagenet64-{strategy}-{blocks}-{layer}"
            which = {"all": "all blocks", "first": "blocks 1 and 2", "last": "blocks 7 and 8"}[blocks]
            about = f"{strategy} alignment of {which}, layer {layer}"
            config = _with(config, strategy=strategy, locations=tuple((t, layer) for t in _BLOCKS[blocks]))
        rows[name] = Preset(config, about, _figures(*figures))
    rows["imagenet64"].published["fid_50k"] = 4.21
    rows["imagenet64"].published["sfid_50k"] = 5.34
    rows["imagenet64-reverse"].published["fid_50k"] = 3.69
    rows["imagenet64-reverse"].published["sfid_50k"] = 4.34
    return rows


def _encoders() -> dict[str, Preset]:
    base = _with(_IMAGENET64, strategy="reverse")
    return {
        f"imagenet64-reverse-{short}": Preset(
            _with(base, encoder=encoder), f"reverse alignment with {about}", _figures(*figures)
        )
        for short, about, encoder, *figures in _ENCODERS
    }


def _latents() -> dict[str, Preset]:
    reverse = _with(_IMAGENET256, strategy="reverse")
    none, own = "ImageNet 256×256 in latents, likelihood alone", "reverse alignment in latents"
    rows = {
        "imagenet256": Preset(
            _IMAGENET256,
            none,
            {"fid": 13.82, "top1": 45.97, "fid_50k": 5.15, "sfid_50k": 6.78, "is_50k": 243.49},
        ),
        "imagenet256-reverse": Preset(
            reverse, own, {"fid": 13.26, "top1": 57.85, "fid_50k": 4.95, "sfid_50k": 6.89, "is_50k": 234.99}
        ),
        "imagenet256-reverse-patch1": Preset(
            _model(reverse, patch_size=1),
            f"{own}, patch 1",
            {"fid_50k": 4.18, "sfid_50k": 4.96, "is_50k": 240.8},
        ),
        "imagenet256-reverse-weight0.5": Preset(
            _with(reverse, weight=0.5), f"{own}, weight 0.5", {"fid": 13.74}
        ),
    }
    for noise in (0.1, 0.3):
        rows[f"imagenet256-noise{noise:g}"] = Preset(
            _model(_IMAGENET256, noise_std=noise), f"noise {noise:g}; the paper found 0.2 best of 0.1 to 0.3"
        )
    return rows


def _steps() -> dict[str, Preset]:
    rows = {}
    for size, strategy, thousands, fid, top1 in _STEPS:
        base = _with(_IMAGENET64 if size == 64 else _IMAGENET256, strategy=strategy)
        name = f"imagenet{size}" + ("" if strategy == "none" else f"-{strategy}") + f"-{thousands}k"
        config = replace(base, train=replace(base.train, steps=1000 * thousands))
        rows[name] = Preset(
            config, f"{size}×{size}, {strategy}, {thousands}k steps", {"fid": fid, "top1": top1}
        )
    return rows


def _tarflow() -> dict[str, Preset]:
    return {
        f"tarflow-{name}": Preset(
            replace(
                _IMAGENET64,
                model=ModelConfig(
                    image_size=size, patch_size=patch, width=width, noise_std=noise, num_classes=classes
                ),
            ),
            f"TARFlow's model (arXiv 2412.06329), {size}×{size}, patch {patch}, width {width}",
        )
        for name, size, patch, width, noise, classes in _TARFLOW
    }


TABLES: dict[str, dict[str, Preset]] = {
    "table1": _strategies(),
    "encoders": _encoders(),
    "latents": _latents(),
    "steps": _steps(),
    "tarflow": _tarflow(),
}
"""Groups of rows, by preset: `table1`, strategies × blocks × layers; the others after what they change."""
