"""The settings of every preset, one row each: a name, what it is, where it starts from, and what it changes.

Sources: arXiv 2511.22345 (`imagenet64*`, `imagenet256*`); for `tarflow-*` arXiv 2412.06329, and for
`itarflow-*` arXiv 2604.20041, each with the training commands of its public code; for `starflow-*` arXiv
2506.06276. Blocks count from the data, 1, to the noise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowback.checked import from_dict
from flowback.config import AlignmentConfig, CodecConfig, DataConfig, ModelConfig, RunConfig, TrainConfig

__all__ = ["SETTINGS", "mini"]

IMAGENET64 = RunConfig(
    model=ModelConfig(num_classes=1000),
    data=DataConfig(name="folder", flip=True, workers=8),
    alignment=AlignmentConfig(encoder="timm:vit_base_patch14_dinov2.lvd142m"),
    train=TrainConfig(precision="bf16"),
)
"""Table 6 of the paper; the fields' own defaults are its settings too."""

IMAGENET256 = replace(
    IMAGENET64,
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
"""The VAE's latents of 256×256 images: 4 channels of 32×32."""

DIGITS = RunConfig(
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

PHOTOS_LARGE = RunConfig(
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

PHOTOS = replace(PHOTOS_LARGE, model=replace(PHOTOS_LARGE.model, width=96, layers=2))
"""0.38 GFLOP for an image in a step, a sixth of the larger one's: its 128,000 images are 49 TFLOP, 20 minutes
for two cores at about 20 GFLOP/s each; two of a Xeon with AVX-512 did 294 images/s, seven minutes in all."""

EMOJI = replace(PHOTOS_LARGE, data=DataConfig("emoji", flip=True))
"""Nine classes of 3,655 drawings; made from Debian's packages."""

FASHION = RunConfig(
    model=ModelConfig(
        image_size=28,
        channels=1,
        patch_size=4,
        width=64,
        blocks=4,
        layers=2,
        head_dim=32,
        noise_std=0.1,
        num_classes=10,
    ),
    data=DataConfig("fashion-mnist", limit=20_000),
    alignment=AlignmentConfig(locations=((3, 2), (4, 2)), weight=0.5, hidden=128, tolerance=0.01),
    train=TrainConfig(
        steps=2000,  # 64,000 images: about four minutes on one core for likelihood alone
        batch_size=32,
        label_drop=0.1,
        lr=2e-3,
        warmup_steps=100,
        ema_decay=0.99,
        grad_clip=1.0,
        log_every=100,
        eval_every=500,
        eval_images=1000,
        eval_exhaustive=True,
        frechet_every=500,
        save_every=1000,
    ),
)
"""A third of the training images, so that their features are made in a few minutes."""

_FIRST, _LAST, _ALL = (1, 2), (7, 8), tuple(range(1, 9))
_LAST4, _ALL4 = (3, 4), (1, 2, 3, 4)
"""The same places in a flow of 4 blocks."""

_CLIP_B, _MAE_B = "timm:vit_base_patch16_clip_quickgelu_224.openai", "timm:vit_base_patch16_224.mae"
_DINOV2_B, _DINOV2_L = "timm:vit_base_patch14_dinov2.lvd142m", "timm:vit_large_patch14_dinov2.lvd142m"

_Rows = tuple[tuple[Any, ...], ...]
"""(name, what it is, what it changes of the settings it starts from) for each preset."""


def _align(strategy: str, blocks: tuple[int, ...], layer: int, **more: Any) -> dict[str, Any]:
    return {"alignment": {"strategy": strategy, "locations": [(t, layer) for t in blocks], **more}}


_MAIN = _align("reverse", _LAST, 6)
_MAIN4 = _align("reverse", _LAST4, 2)
"""The paper's own choice, and the one that stands for it in a flow of 4 blocks of 2 layers."""
_EXACT: dict[str, Any] = {"alignment": {"strategy": "reverse", "order": "exact"}}
_1M: dict[str, Any] = {"train": {"steps": 1_000_000}}


def _tarflow(epochs: int, batch: int, images: int, **model: Any) -> dict[str, Any]:
    """A run of TARFlow's code: full batches only, one epoch of warm-up, no averaged weights."""
    steps = images // batch
    return {
        "model": model,
        "train": {
            "steps": epochs * steps,
            "batch_size": batch,
            "warmup_steps": steps,
            "ema_decay": 0.0,
            "precision": "fp32" if model.get("noise") == "uniform" else "bf16",
        },
    }


def _itarflow(epochs: int, noise_max: float, label_drop: float = 0.1, **model: Any) -> dict[str, Any]:
    """A run of iTARFlow's code: a range of noise levels, most layers next to the noise, no averaging."""
    steps = _IMAGENET // 512
    return {
        "model": {
            "blocks": 4,
            "layers": (4, 4, 4, 24),
            "noise": "range",
            "noise_min": 0.01,
            "noise_max": noise_max,
            **model,
        },
        "train": {
            "steps": epochs * steps,
            "batch_size": 512,
            "warmup_steps": steps,
            "min_lr": 1e-5,
            "ema_decay": 0.0,
            "label_drop": label_drop,
            "levels": "uniform",
            "level_weight": "level",
        },
    }


_IMAGENET, _DOWNSAMPLED, _AFHQ = 1_281_167, 1_281_149, 14_630
"""Training images of ImageNet, of the downsampled set of arXiv 1601.06759, and of AFHQ's first version."""

_IMAGENET64: _Rows = (
    # Table 1, 400k steps.
    ("imagenet64", "ImageNet 64×64, likelihood alone"),
    ("imagenet64-forward-all-2", "forward, all blocks, layer 2", _align("forward", _ALL, 2)),
    ("imagenet64-detach-all-2", "detach, all blocks, layer 2", _align("detach", _ALL, 2)),
    ("imagenet64-reverse-all-2", "reverse, all blocks, layer 2", _align("reverse", _ALL, 2)),
    ("imagenet64-forward-first-2", "forward, blocks 1 and 2, layer 2", _align("forward", _FIRST, 2)),
    ("imagenet64-detach-first-2", "detach, blocks 1 and 2, layer 2", _align("detach", _FIRST, 2)),
    ("imagenet64-detach-last-2", "detach, blocks 7 and 8, layer 2", _align("detach", _LAST, 2)),
    ("imagenet64-reverse-last-2", "reverse, blocks 7 and 8, layer 2", _align("reverse", _LAST, 2)),
    ("imagenet64-reverse-last-4", "reverse, blocks 7 and 8, layer 4", _align("reverse", _LAST, 4)),
    ("imagenet64-reverse", "reverse, blocks 7 and 8, layer 6", _MAIN),
    # Tables 2 and 3: the steps.
    ("imagenet64-1000k", "likelihood alone, 1M steps", _1M),
    ("imagenet64-reverse-600k", "reverse, 600k steps", _MAIN | {"train": {"steps": 600_000}}),
    ("imagenet64-reverse-800k", "reverse, 800k steps", _MAIN | {"train": {"steps": 800_000}}),
    ("imagenet64-reverse-1000k", "reverse, 1M steps", _MAIN | _1M),
    # Table 5: forward at the place of the others. Table 7: the layer.
    ("imagenet64-forward-last-2", "forward, blocks 7 and 8, layer 2", _align("forward", _LAST, 2)),
    ("imagenet64-detach-all-4", "detach, all blocks, layer 4", _align("detach", _ALL, 4)),
    ("imagenet64-detach-all-6", "detach, all blocks, layer 6", _align("detach", _ALL, 6)),
)

_IMAGENET256: _Rows = (
    # Tables 2 and 4.
    ("imagenet256", "ImageNet 256×256 in latents, likelihood alone"),
    ("imagenet256-reverse", "reverse in latents", _MAIN),
    ("imagenet256-1000k", "latents, likelihood alone, 1M steps", _1M),
    ("imagenet256-reverse-1000k", "reverse in latents, 1M steps", _MAIN | _1M),
    (
        "imagenet256-reverse-patch1-1000k",
        "reverse in latents, patch 1, 1M steps",
        _MAIN | _1M | {"model": {"patch_size": 1}},
    ),
    # Table 9: the weight. Fig. 5: the noise.
    ("imagenet256-reverse-weight0.5", "latents, weight 0.5", _align("reverse", _LAST, 6, weight=0.5)),
    ("imagenet256-noise0.1", "latents, noise 0.1", {"model": {"noise_std": 0.1}}),
    ("imagenet256-noise0.15", "latents, noise 0.15", {"model": {"noise_std": 0.15}}),
    ("imagenet256-noise0.25", "latents, noise 0.25", {"model": {"noise_std": 0.25}}),
    ("imagenet256-noise0.3", "latents, noise 0.3", {"model": {"noise_std": 0.3}}),
)

_TARFLOW: _Rows = (
    # [patch-width-8-8], and the budget. AdamW from 1e-4 to 1e-6 for all.
    (
        "tarflow-imagenet64",
        "TARFlow [2-768-8-8], noise 0.05, 200 epochs of batch 256",
        _tarflow(200, 256, _IMAGENET, patch_size=2, width=768),
    ),
    (
        "tarflow-imagenet64-patch4",
        "TARFlow [4-1024-8-8], noise 0.05, 300 epochs of batch 480",
        _tarflow(300, 480, _IMAGENET, patch_size=4, width=1024),
    ),
    (
        "tarflow-imagenet64-uncond",
        "TARFlow [2-768-8-8], unconditional, noise 0.05, 200 epochs of batch 256",
        _tarflow(200, 256, _DOWNSAMPLED, patch_size=2, width=768, num_classes=0),
    ),
    (
        "tarflow-imagenet64-bpd",
        "TARFlow [2-768-8-8], unconditional, uniform noise for bits/dim, 100 epochs of batch 256",
        _tarflow(100, 256, _DOWNSAMPLED, patch_size=2, width=768, num_classes=0, noise="uniform"),
    ),
    (
        "tarflow-imagenet128",
        "TARFlow [4-1024-8-8], 128×128, noise 0.15, 320 epochs of batch 768",
        _tarflow(320, 768, _IMAGENET, patch_size=4, width=1024, image_size=128, noise_std=0.15),
    ),
    (
        "tarflow-afhq256",
        "TARFlow [8-768-8-8], AFHQ 256×256, noise 0.07, 4,000 epochs of batch 256",
        _tarflow(4000, 256, _AFHQ, patch_size=8, width=768, image_size=256, noise_std=0.07, num_classes=None),
    ),
)

_ITARFLOW: _Rows = (
    # Four blocks of 4, 4, 4 and 24 layers, 1,281,167 images in batches of 512. Without published figures: the
    # paper's are of samples in 30, 50 and 70 denoising steps, at the guidance named here.
    (
        "itarflow-imagenet64",
        "iTARFlow [2-1280], levels 0.01 to 0.3, 300 epochs (guidance 2.1)",
        _itarflow(300, 0.3, patch_size=2, width=1280),
    ),
    (
        "itarflow-imagenet128",
        "iTARFlow [4-1600], 128×128, levels 0.01 to 0.5, 450 epochs (guidance 3.7)",
        _itarflow(450, 0.5, patch_size=4, width=1600, image_size=128),
    ),
    (
        "itarflow-imagenet256",
        "iTARFlow [8-2176], 256×256, levels 0.01 to 0.7, 600 epochs, labels always seen (guidance 4.2)",
        _itarflow(600, 0.7, label_drop=0.0, patch_size=8, width=2176, image_size=256),
    ),
    # The layout of STARFlow's public 3B model, in pixels: its own experiments in pixels do not name theirs.
    # Its shallow blocks see no label, and its scales are softplus; here both are TARFlow's.
    (
        "starflow-imagenet64",
        "TARFlow [4-1024] in STARFlow's layout: 5 blocks of 2 layers, one of 24 next to the noise",
        _tarflow(300, 480, _IMAGENET, patch_size=4, width=1024, blocks=6, layers=(2, 2, 2, 2, 2, 24)),
    ),
)

_ENCODERS: _Rows = (
    # Table 8.
    ("imagenet64-reverse-clip-b", "with CLIP-B", _align("reverse", _LAST, 6, encoder=_CLIP_B)),
    ("imagenet64-reverse-mae-b", "with MAE-B (CC BY-NC 4.0)", _align("reverse", _LAST, 6, encoder=_MAE_B)),
    ("imagenet64-reverse-dinov2-l", "with DINOv2-L", _align("reverse", _LAST, 6, encoder=_DINOV2_L)),
)

_FASHION: _Rows = (
    ("fashion", "Fashion-MNIST 28×28, likelihood alone"),
    ("fashion-forward-all", "forward, all blocks", _align("forward", _ALL4, 2)),
    ("fashion-detach-all", "detach, all blocks", _align("detach", _ALL4, 2)),
    ("fashion-reverse-all", "reverse, all blocks", _align("reverse", _ALL4, 2)),
    ("fashion-exact-all", "exact reverse, all blocks", _align("reverse", _ALL4, 2, order="exact")),
    ("fashion-forward-first", "forward, blocks 1 and 2", _align("forward", _FIRST, 2)),
    ("fashion-detach-first", "detach, blocks 1 and 2", _align("detach", _FIRST, 2)),
    ("fashion-reverse-first", "reverse, blocks 1 and 2", _align("reverse", _FIRST, 2)),
    ("fashion-exact-first", "exact reverse, blocks 1 and 2", _align("reverse", _FIRST, 2, order="exact")),
    ("fashion-forward-last", "forward, blocks 3 and 4", _align("forward", _LAST4, 2)),
    ("fashion-detach-last", "detach, blocks 3 and 4", _align("detach", _LAST4, 2)),
    ("fashion-reverse-last", "reverse, blocks 3 and 4", _MAIN4),
    ("fashion-exact-last", "exact reverse, blocks 3 and 4", _align("reverse", _LAST4, 2, order="exact")),
    ("fashion-detach-4", "detach, block 4", _align("detach", (4,), 2)),
    ("fashion-reverse-4", "reverse, block 4", _align("reverse", (4,), 2)),
    ("fashion-exact-4", "exact reverse, block 4", _align("reverse", (4,), 2, order="exact")),
    # The layer, the weight, the steps, the encoder, the noise.
    ("fashion-detach-all-1", "detach, all blocks, layer 1", _align("detach", _ALL4, 1)),
    ("fashion-reverse-last-1", "reverse, blocks 3 and 4, layer 1", _align("reverse", _LAST4, 1)),
    ("fashion-reverse-last-weight0.03", "weight 0.03", _align("reverse", _LAST4, 2, weight=0.03)),
    ("fashion-reverse-last-weight0.1", "weight 0.1", _align("reverse", _LAST4, 2, weight=0.1)),
    ("fashion-reverse-last-weight1", "weight 1", _align("reverse", _LAST4, 2, weight=1.0)),
    ("fashion-reverse-last-800", "40 % of the steps", _MAIN4 | {"train": {"steps": 800}}),
    ("fashion-reverse-last-1200", "60 % of the steps", _MAIN4 | {"train": {"steps": 1200}}),
    ("fashion-reverse-last-1600", "80 % of the steps", _MAIN4 | {"train": {"steps": 1600}}),
    ("fashion-reverse-last-clip-b", "with CLIP-B", _align("reverse", _LAST4, 2, encoder=_CLIP_B)),
    ("fashion-reverse-last-mae-b", "with MAE-B (CC BY-NC 4.0)", _align("reverse", _LAST4, 2, encoder=_MAE_B)),
    ("fashion-reverse-last-dinov2-b", "with DINOv2-B", _align("reverse", _LAST4, 2, encoder=_DINOV2_B)),
    ("fashion-noise0.05", "noise 0.05", {"model": {"noise_std": 0.05}}),
    ("fashion-noise0.15", "noise 0.15", {"model": {"noise_std": 0.15}}),
    ("fashion-noise0.2", "noise 0.2", {"model": {"noise_std": 0.2}}),
)

_STUDENTS: _Rows = (
    # A step costs less than one of the teacher's own training: 23/24 for matching, half for inverse, which
    # therefore takes twice as many.
    (
        "student-fashion",
        "one-pass student of a Fashion-MNIST flow",
        {"student": {"method": "inverse", "width": 32}, "train": {"steps": 4000}},
    ),
    ("student-fashion-matching", "flow matching on its coupling", {"student": {"method": "matching"}}),
    (
        "student-fashion-independent",
        "flow matching on independent noise, the control",
        {"student": {"method": "matching", "coupling": "independent"}},
    ),
)

_RANGE: dict[str, Any] = {"model": {"noise": "range", "noise_min": 0.05, "noise_max": 0.5}}
_LEVELS: dict[str, Any] = {"train": {"levels": "uniform", "level_weight": "level-share"}}
"""A range from below the noise of `fashion` to the level where only coarse shapes are left. The likelihood's
weights have the mean 1/2, and alignment has half the weight, so that the two compare as in `fashion`."""


def _ranged(strategy: str = "none", blocks: tuple[int, ...] = _LAST4, order: int | str = 0) -> dict[str, Any]:
    return _RANGE | _LEVELS | _align(strategy, blocks, 2, order=order, weight=0.25)


_FASHION_RANGE: _Rows = (
    ("fashion-range", "noise levels from 0.05 to 0.5, likelihood alone", _ranged()),
    ("fashion-range-reverse-4", "noise levels from 0.05 to 0.5, reverse, block 4", _ranged("reverse", (4,))),
    (
        "fashion-range-exact-4",
        "noise levels from 0.05 to 0.5, exact reverse, block 4",
        _ranged("reverse", (4,), order="exact"),
    ),
    (
        "fashion-range-exact-last",
        "noise levels from 0.05 to 0.5, exact reverse, blocks 3 and 4",
        _ranged("reverse", order="exact"),
    ),
)

_DIGITS: _Rows = (
    ("digits", "scikit-learn's 8×8 digits, likelihood alone; about two minutes on two cores"),
    ("digits-reverse", "the same with exact reverse alignment", _EXACT),
    ("digits-range", "digits with noise levels from 0.05 to 0.5, likelihood alone", _RANGE | _LEVELS),
    (
        "digits-mini",
        "a flow that trains in about 30 s on one core and saves every few seconds; for fault tests",
        {
            "model": {"width": 32, "blocks": 2, "layers": 1},
            "alignment": {"locations": [(2, 1)]},
            "train": {"steps": 1500, "log_every": 25, "save_every": 100, "eval_every": 500},
        },
    ),
)

_EMOJI: _Rows = (
    ("emoji", "emoji at 32×32 in colour, likelihood alone"),
    ("emoji-reverse", "emoji at 32×32 with exact reverse alignment", _EXACT),
)

_PHOTOS: _Rows = (
    (
        "folder-32",
        "a folder of images at 32×32 (--data.path), likelihood alone; shapes in 20 minutes on two cores",
    ),
    ("folder-32-reverse", "the same with exact reverse alignment", _EXACT),
)

_PHOTOS_LARGE: _Rows = (
    ("folder-32-large", "a folder of images at 32×32, likelihood alone; two hours on two cores, or a GPU"),
    ("folder-32-large-reverse", "the same with exact reverse alignment", _EXACT),
)


def mini(config: RunConfig) -> RunConfig:
    """The small sibling on digits: the same strategy, blocks, relative depth, noise and share of steps.

    4 blocks of 4 layers stand for 8 of 8, a quarter of the layers for blocks of different depths,
    EfficientNet-Lite0 for any encoder; latents become pixels.
    """
    model, latent = config.model, config.codec.vae is not None
    # Blocks 1, 2 and 7, 8 stay next to the data and next to the noise; all become all.
    several = len(config.alignment.locations) > 2
    locations = dict.fromkeys(
        ((t + 1) // 2 if several else t if t <= 2 else t - 4, layer // 2)
        for t, layer in config.alignment.locations
    )
    steps = 600 * config.train.steps // 400_000
    uneven, ranged = isinstance(model.layers, tuple), model.noise == "range"

    def louder(level: float) -> float:
        return DIGITS.model.noise_std * level / (0.2 if latent else 0.05)

    return RunConfig(
        model=replace(
            DIGITS.model,
            image_size=8 if latent else model.image_size // 8,
            patch_size=model.patch_size if latent else model.patch_size // 2,
            blocks=model.blocks if uneven else DIGITS.model.blocks,
            layers=tuple(max(1, depth // 4) for depth in model.depths) if uneven else 4,
            mlp=model.mlp,
            position=model.position,
            noise=model.noise,
            noise_std=louder(model.noise_std),
            noise_min=louder(model.noise_min) if ranged else model.noise_min,
            noise_max=louder(model.noise_max) if ranged else model.noise_max,
            num_classes=0 if model.num_classes == 0 else None,
        ),
        data=DIGITS.data,
        alignment=replace(
            config.alignment, encoder=DIGITS.alignment.encoder, hidden=128, locations=tuple(locations)
        ),
        train=replace(
            DIGITS.train,
            steps=steps,
            eval_every=300,
            save_every=300,
            levels=config.train.levels,
            level_weight=config.train.level_weight,
        ),
    )


def _settings() -> dict[str, tuple[str, RunConfig]]:
    groups = (
        (DIGITS, _DIGITS),
        (PHOTOS, _PHOTOS),
        (PHOTOS_LARGE, _PHOTOS_LARGE),
        (FASHION, _FASHION),
        (
            replace(FASHION, alignment=AlignmentConfig(), train=replace(FASHION.train, frechet_every=0)),
            _STUDENTS,
        ),
        (FASHION, _FASHION_RANGE),
        (EMOJI, _EMOJI),
        (IMAGENET64, _IMAGENET64),
        (IMAGENET256, _IMAGENET256),
        (IMAGENET64, _TARFLOW),
        (IMAGENET64, _ITARFLOW),
        (IMAGENET64, _ENCODERS),
    )
    rows = {
        name: (about, from_dict(RunConfig, changes[0] if changes else {}, base))
        for base, group in groups
        for name, about, *changes in group
    }
    # With one encoder in place of all, the encoders' rows would be copies of one run.
    for name, *_ in (*_IMAGENET64, *_IMAGENET256, *_TARFLOW, *_ITARFLOW):
        about, config = rows[name]
        rows[f"{name}-mini"] = (f"small, on digits: {about}", mini(config))
    return rows


SETTINGS: dict[str, tuple[str, RunConfig]] = _settings()
"""What it is, and the settings, by name."""
