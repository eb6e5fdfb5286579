"""Settings of a run: frozen dataclasses, checked when they are created, stored as JSON in the checkpoint.

Blocks and layers are counted from 1, as in the paper: block 1 is next to the data, block T next to the
noise. Unknown keys are errors, so a misspelled option is never ignored.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from flowback.checked import Checked, require

__all__ = [
    "AlignmentConfig",
    "CodecConfig",
    "Crop",
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "StudentConfig",
    "TrainConfig",
]

Crop = Literal["bicubic", "adm", "tarflow"]
"""How an image becomes a square: as when training from a folder, ADM's way, or TARFlow's."""

_MOST = {
    "image_size": 2**14,
    "channels": 2**12,
    "patch_size": 2**12,
    "width": 2**16,
    "blocks": 2**10,
    "layers": 2**10,
    "head_dim": 2**12,
    "mlp_ratio": 2**8,
}
"""Far above what anyone trains: a file that says more is damaged, or made to exhaust the machine."""
MOST_LAYERS = 2**12
MOST_CLASSES = 2**24
MOST_TOKENS = 2**16


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The flow (TARFlow, arXiv 2412.06329)."""

    section: ClassVar[str] = "model"

    image_size: int = 64
    """Height and width of the images, in pixels."""
    channels: int = 3
    """Colour channels of the images."""
    patch_size: int = 4
    """Side of the square patch that becomes one token."""
    width: int = 1024
    """Width of the Transformers."""
    blocks: int = 8
    """Autoregressive blocks T."""
    layers: int | tuple[int, ...] = 8
    """Transformer layers in each block: one number for all, or one a block from block 1, next to the data."""
    head_dim: int = 64
    """Width of one attention head."""
    mlp_ratio: int = 4
    """Hidden width of the MLP, in units of the width (SwiGLU takes 2/3 of it: same parameter count)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of the Transformer layers."""
    position: Literal["learned", "rope"] = "learned"
    """Position code: a learned table, or rotary embedding of the token's row and column."""
    qk_norm: bool = False
    """RMS-normalise queries and keys."""
    log_scale_bound: float | None = None
    """Keep every log-scale s within ±a, smoothly, as a·tanh(s/a); None leaves it free."""
    num_classes: int | None = None
    """Number of classes; 0 is unconditional; None takes the number from the data."""
    noise: Literal["gaussian", "uniform", "range"] = "gaussian"
    """Noise added to the images in training: Gaussian, uniform dequantisation of 8-bit values, or Gaussian at
    a level of its own for each image, which the flow is told (arXiv 2604.20041)."""
    noise_std: float = 0.05
    """Standard deviation of the noise `gaussian`, on the [-1, 1] scale."""
    noise_min: float = 0.01
    """Lowest level of the noise `range`, a standard deviation on the [-1, 1] scale."""
    noise_max: float = 0.3
    """Highest level of the noise `range`."""

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        for name, most in _MOST.items():
            value, option = getattr(self, name), f"--model.{name.replace('_', '-')}"
            for size in value if isinstance(value, tuple) else (value,):
                require(size > 0, f"{option} must be at least 1.")
                require(size <= most, f"{option} is {size:.3g}, and flowback takes at most {most}.")
        if isinstance(self.layers, tuple):
            require(
                len(self.layers) == self.blocks,
                f"--model.layers {','.join(map(str, self.layers[:16]))} names {len(self.layers)} blocks, and "
                f"--model.blocks is {self.blocks}; give one number for all blocks, or one for each.",
            )
            if len(set(self.layers)) == 1:  # one way to write a model, so that equal ones compare equal
                object.__setattr__(self, "layers", self.layers[0])
        require(
            self.image_size % self.patch_size == 0,
            f"--model.image-size {self.image_size} is not divisible by --model.patch-size {self.patch_size}; "
            "choose a patch size that divides it.",
        )
        require(
            self.width % self.head_dim == 0,
            f"--model.width {self.width} is not divisible by --model.head-dim {self.head_dim}; "
            "choose a head size that divides it.",
        )
        require(
            self.position == "learned" or self.head_dim % 4 == 0,
            f"--model.head-dim {self.head_dim} must be a multiple of 4 for --model.position rope.",
        )
        require(
            self.num_classes is None or self.num_classes >= 0, "--model.num-classes must not be negative."
        )
        require(
            (self.num_classes or 0) <= MOST_CLASSES,
            f"--model.num-classes is above {MOST_CLASSES}, the most that flowback takes.",
        )
        require(
            sum(self.depths) <= MOST_LAYERS,
            f"--model.blocks {self.blocks} of --model.layers {self.layers} are more than the {MOST_LAYERS} "
            "layers that flowback takes.",
        )
        require(
            self.tokens <= MOST_TOKENS,
            f"--model.image-size {self.image_size} with --model.patch-size {self.patch_size} gives "
            f"{self.tokens} tokens, and flowback takes at most {MOST_TOKENS}; choose larger patches.",
        )
        require(self.noise_std >= 0, "--model.noise-std must not be negative.")
        require(
            self.log_scale_bound is None or self.log_scale_bound > 0,
            "--model.log-scale-bound must be above 0.",
        )
        if self.noise != "range":
            return
        require(
            0 < self.noise_min < self.noise_max,
            f"--model.noise-min {self.noise_min:g} must be above 0 and below --model.noise-max "
            f"{self.noise_max:g}, for --model.noise range.",
        )
        require(self.width % 2 == 0, f"--model.width {self.width} must be even for --model.noise range.")

    @property
    def noise_level(self) -> float | None:
        """Level at which the flow is measured where none is named; None: uniform dequantisation.

        It is the flow's only one, or the geometric middle of its range.
        """
        if self.noise == "range":
            return math.sqrt(self.noise_min * self.noise_max)
        return self.noise_std if self.noise == "gaussian" else None

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer layers of each block, from block 1."""
        return self.layers if isinstance(self.layers, tuple) else (self.layers,) * self.blocks

    @property
    def locations(self) -> list[tuple[int, int]]:
        """Every (block, layer), counted from 1."""
        return [(t, layer) for t, depth in enumerate(self.depths, start=1) for layer in range(1, depth + 1)]

    @property
    def locations_in_words(self) -> str:
        """Which (block, layer) pairs there are, for messages."""
        if isinstance(self.layers, int):
            return f"blocks go from 1 to {self.blocks}, layers from 1 to {self.layers}"
        return f"blocks go from 1 to {self.blocks}, and have {', '.join(map(str, self.depths))} layers"

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Number of tokens N."""
        return self.grid**2

    @property
    def token_dim(self) -> int:
        """Dimensions D of one token."""
        return self.channels * self.patch_size**2

    @property
    def dims(self) -> int:
        """Dimensions of one image, N * D."""
        return self.tokens * self.token_dim


@dataclass(frozen=True)
class DataConfig(Checked):
    """The images."""

    section: ClassVar[str] = "data"

    name: str = "digits"
    """Data set: `digits` (scikit-learn's), `folder` (of images), `prepared` (by `flowback prepare`), `mnist`,
    `fashion-mnist`, `kmnist`, `emnist`, `cifar10`, `cifar100`, `emoji`, `fake`, or one you registered.
    `none`: the images were given in Python, or nobody knows them."""
    path: Path | None = None
    """Folder of images (one sub-folder per class; none: unconditional), prepared set, or folder with the
    files of a named set. A path with the name left at `digits` means `folder`."""
    download: bool = False
    """Download a named set if its files are not there."""
    flip: bool = False
    """Mirror half of the training images; test images are never mirrored."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """What to do with files that cannot be read: stop with their names, or leave them out and say so."""
    holdout: float = 0.1
    """Share of a folder's images kept for evaluation, if it has no `train` and `test` (or `val`) inside."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the training process."""
    limit: int | None = None
    """Train on only this many images, spread evenly over the set; None takes all."""
    labelled: int | None = None
    """Training images that keep their label, the same number of each class; all others are seen without. None
    leaves all labels."""

    @property
    def folder(self) -> Path | None:
        """The folder of images, where the data are one."""
        return self.path if self.name == "folder" else None

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        require(
            0 <= self.holdout < 1, "--data.holdout must be in [0, 1); 0 evaluates on the training images."
        )
        require(self.workers >= 0, "--data.workers must not be negative.")
        require(self.limit is None or self.limit > 0, "--data.limit must be at least 1.")
        require(self.labelled is None or self.labelled > 0, "--data.labelled must be at least 1.")


@dataclass(frozen=True)
class CodecConfig(Checked):
    """What comes between images and flow: nothing, or a VAE whose latents the flow models."""

    section: ClassVar[str] = "codec"

    vae: str | None = None
    """AutoencoderKL or AutoencoderTiny of diffusers: its name on the hub, or its folder; None: pixels."""
    revision: str | None = None
    """Revision of the VAE on the hub."""
    weights: str | None = None
    """SHA-256 of the VAE's weights, taken when the data were prepared."""
    scale: float | None = None
    """Factor of the latents, which the flow sees as (latent - shift) · scale; None: the VAE's own."""
    shift: float | None = None
    """Subtracted from the latents before they are scaled; None: the VAE's own."""
    image_size: int = 256
    """Height and width of the decoded images."""

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        require(self.scale is None or self.scale > 0, "--codec.scale must be above 0.")


@dataclass(frozen=True)
class AlignmentConfig(Checked):
    """Alignment of the flow's features with those of a frozen encoder (arXiv 2511.22345)."""

    section: ClassVar[str] = "alignment"

    strategy: Literal["none", "forward", "detach", "reverse", "reverse-literal"] = "none"
    """Graph that carries the gradient; `reverse` is the generative pass."""
    order: int | Literal["exact"] = 0
    """Terms of the reverse gradient's series to keep beyond the identity (strategy `reverse`)."""
    tolerance: float = 1e-4
    """`exact` stops when what remains is below this share of the gradient; back substitution, on a CPU,
    leaves rounding alone."""
    weight: float = 0.1
    """Highest weight of the alignment loss."""
    stop_at: int | None = None
    """Step at which alignment stops (HASTE, arXiv 2505.16792); None aligns to the end."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the weight falls to 0 at `stop_at`: at once, along a line, or along half a cosine."""
    stop_below: float | None = None
    """Also stop when the mean cosine between the two losses' gradients is below this (HASTE's trigger). It is
    measured every `--train.diagnose-every` steps, in the blocks that alignment reaches. None: never."""
    locations: tuple[tuple[int, int], ...] = ((7, 6), (8, 6))
    """(block, layer) pairs whose features are aligned, counted from 1."""
    levels: tuple[float, float] | None = None
    """Lowest and highest noise level of the images that are aligned, for `--model.noise range`; None: all."""
    encoder: str = "efficientnet_lite0"
    """Frozen encoder: `efficientnet_lite0`, or `timm:NAME`."""
    weights: Path | None = None
    """Local file of the encoder's weights, instead of a download."""
    grid: int | None = None
    """Encoder patches along one side; None takes the flow's token grid."""
    originals: bool = False
    """Make the encoder's input from the original image files, not from the images at the flow's size."""
    originals_path: Path | None = None
    """Prepared set of the same images at another size, for the encoder to see instead of the flow's."""
    projector: Literal["mlp", "conv"] = "mlp"
    """Maps flow features to the encoder's space: three linear layers, or one 3×3 convolution over the token
    grid, without a non-linearity (iREPA, arXiv 2512.10794)."""
    hidden: int = 1024
    """Hidden width of the projector `mlp`."""
    spatial_norm: float | None = None
    """γ of iREPA's targets, (v − γ·mean over patches) / (std over patches); iREPA: 0.6 to 0.8. None: v."""
    subtract: Literal["nothing", "place", "class-place"] = "nothing"
    """What the targets lose before anything else: their mean over the training images at each patch, or over
    those of the same class. The rest cannot be met by position and label alone."""

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        require(
            self.weight >= 0, f"--alignment.weight {self.weight} must not be negative; 0 switches it off."
        )
        require(self.stop_at is None or self.stop_at > 0, "--alignment.stop-at must be at least 1.")
        require(
            self.decay == "none" or self.stop_at is not None,
            f"--alignment.decay {self.decay} needs --alignment.stop-at, the step at which the weight is 0.",
        )
        require(
            self.stop_below is None or -1 <= self.stop_below <= 1,
            "--alignment.stop-below must be in [-1, 1], the range of a cosine.",
        )
        require(
            self.order == "exact" or self.order >= 0,
            f"--alignment.order {self.order} must be 0, 1, 2, ... or exact.",
        )
        require(self.tolerance > 0, "--alignment.tolerance must be above 0.")
        require(self.hidden > 0, "--alignment.hidden must be at least 1.")
        require(
            self.levels is None or 0 <= self.levels[0] < self.levels[1],
            f"--alignment.levels {self.levels} must rise from at least 0: the lowest and the highest level.",
        )
        require(
            self.spatial_norm is None or 0 <= self.spatial_norm <= 1,
            "--alignment.spatial-norm must be in [0, 1]; None leaves the targets as they are.",
        )
        require(self.grid is None or self.grid > 0, "--alignment.grid must be at least 1.")
        require(
            len(set(self.locations)) == len(self.locations),
            f"--alignment.locations repeats a location: {self.locations}; give each once.",
        )
        require(
            not (self.originals and self.originals_path),
            "--alignment.originals uses image files, --alignment.originals-path a prepared set; give one.",
        )
        require(
            self.strategy == "none" or len(self.locations) > 0,
            "--alignment.locations is empty; give a BLOCK LAYER pair, or --alignment.strategy none.",
        )

    @property
    def active(self) -> bool:
        """Whether an alignment loss is added at all."""
        return self.strategy != "none" and self.weight > 0


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Optimisation, and how often to log, evaluate and save."""

    section: ClassVar[str] = "train"

    init_from: str | None = None
    """Run, checkpoint or name on the Hub whose weights a new run begins with; classes are matched by name."""
    steps: int = 400_000
    """Optimiser steps."""
    batch_size: int = 256
    """Images in a step, over all processes and accumulation steps."""
    micro_batch: int | None = None
    """Images that a process holds at once; if fewer than its share of the batch, gradients accumulate."""
    lr: float = 1e-4
    """Highest learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 5000
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's momenta."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, which sampling and evaluation use."""
    ema_more: tuple[float, ...] = ()
    """Decays of further averages, kept to choose from later."""
    levels: Literal["uniform", "square", "log", "log-normal"] = "uniform"
    """Distribution of the images' noise levels, for `--model.noise range`: uniform in t, t² or log t, or
    log t normal with mean -1.2 and standard deviation 1; all within the range."""
    level_weight: Literal["none", "level", "level-share", "square", "square-share"] = "level"
    """Weight of an image's likelihood in the loss by its noise level t in the range t0 to t1: 1, t,
    t / (t0 + t1), t², t² / (t0² + t1²)."""
    label_drop: float = 0.1
    """Share of labels replaced by the unconditional embedding."""
    grad_clip: float | None = None
    """Largest gradient norm; None does not clip."""
    bad_steps: int | None = 0
    """Steps with a bad gradient to skip before the run stops; None skips any number."""
    spike: float | None = None
    """A gradient norm above this many times its running mean is bad too; None allows spikes."""
    seed: int = 0
    """Seed of everything random in the run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast dtype of the Transformer bodies; shift, log-scale and log-det are fp32 in both."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 2000
    """Steps between evaluations on the test images."""
    eval_exhaustive: bool = False
    """Also classify them by the exhaustive rule, which takes a pass for every class."""
    frechet_every: int = 0
    """Steps between Fréchet distances of unguided samples to the training images; 0 for none."""
    frechet_samples: int = 1000
    """Samples of each such distance."""
    save_every: int = 2000
    """Steps between checkpoints."""
    sample_every: int = 0
    """Steps between pictures of samples; 0 for none."""
    diagnose_every: int = 0
    """Steps between comparisons of the two losses' gradients, block by block; 0 for none."""
    eval_images: int = 1024
    """Test images in each evaluation, spread evenly over the set."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 for none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that also show the metrics; each is an extra, as in `pip install flowback-nf[wandb]`."""
    checkpoint_activations: bool = False
    """Keep only the input of each Transformer layer, and recompute the rest for the gradient."""
    compile: bool = False
    """Compile the Transformer of each block; the first steps take minutes."""
    shard: bool = False
    """Split weights, gradients, optimiser state and averages over the processes (FSDP2)."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before it gives up; must exceed an evaluation's time."""

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        counts = ("steps", "batch_size", "log_every", "eval_every", "save_every", "eval_images", "keep_last")
        for name in counts:
            require(getattr(self, name) > 0, f"--train.{name.replace('_', '-')} must be at least 1.")
        require(self.sample_every >= 0, "--train.sample-every must not be negative; 0 draws none.")
        require(self.frechet_every >= 0, "--train.frechet-every must not be negative; 0 measures none.")
        require(self.frechet_samples >= 2, "--train.frechet-samples must be at least 2.")
        require(self.diagnose_every >= 0, "--train.diagnose-every must not be negative; 0 turns it off.")
        require(self.micro_batch is None or self.micro_batch > 0, "--train.micro-batch must be at least 1.")
        require(
            self.lr > 0 and self.min_lr >= 0, "--train.lr must be above 0 and --train.min-lr not negative."
        )
        require(
            self.min_lr <= self.lr,
            f"--train.min-lr {self.min_lr:g} is above --train.lr {self.lr:g}; choose a smaller one.",
        )
        require(all(0 <= beta < 1 for beta in self.betas), "--train.betas must both be in [0, 1).")
        require(self.weight_decay >= 0, "--train.weight-decay must not be negative.")
        require(0 <= self.seed < 2**63, "--train.seed must be in [0, 2^63).")
        require(self.warmup_steps >= 0, "--train.warmup-steps must not be negative.")
        require(all(0 <= decay < 1 for decay in self.averages), "--train.ema-decay must be in [0, 1).")
        require(
            len(set(self.averages)) == len(self.averages), "--train.ema-more repeats a decay; give each once."
        )
        require(self.keep_every >= 0, "--train.keep-every must not be negative; 0 keeps only the newest.")
        require(0 <= self.label_drop <= 1, "--train.label-drop must be in [0, 1].")
        require(self.bad_steps is None or self.bad_steps >= 0, "--train.bad-steps must not be negative.")
        require(self.spike is None or self.spike > 1, "--train.spike must be above 1.")
        require(self.grad_clip is None or self.grad_clip > 0, "--train.grad-clip must be above 0.")
        require(0 < self.timeout <= 1e9, "--train.timeout must be above 0, and at most 1e9.")
        require(
            len(set(self.trackers)) == len(self.trackers), "--train.trackers repeats a name; give each once."
        )

    @property
    def averages(self) -> tuple[float, ...]:
        """Decays of all moving averages, the main one first."""
        return (self.ema_decay, *self.ema_more)


@dataclass(frozen=True)
class StudentConfig(Checked):
    """A student: a Transformer that learns from a frozen flow, its teacher, to draw images in few passes."""

    section: ClassVar[str] = "student"

    method: Literal["none", "inverse", "matching"] = "none"
    """`inverse`: the teacher's inverse in one evaluation (BiFlow, arXiv 2512.10953). `matching`: a velocity
    from the teacher's noise to images (NFM, arXiv 2603.09014). `none`: the run trains a flow."""
    teacher: str | None = None
    """The teacher's run, checkpoint, or name on the Hub."""
    teacher_weights: str | None = None
    """SHA-256 of the teacher's weights, taken when the training began."""
    width: int | None = None
    """Width of the student's Transformer; None takes the teacher's."""
    layers: int = 1
    """Layers of each stage; there are as many stages as the teacher has blocks, and one more."""
    hidden_weight: float = 1.0
    """Weight of the hidden alignment beside the loss of the images (`inverse`)."""
    clip: float = 4.0
    """Largest value of the targets, in units of each state's root mean square (`inverse`)."""
    guidance: float = 0.0
    """Largest guidance scale that the student learns as an input (`inverse`); 0 learns none."""
    features: str | None = None
    """Encoder whose features of the predicted clean images shall be right too (`inverse`): named as in
    `--alignment.encoder`. Figures in features of a network near this one then flatter the student."""
    feature_weight: float = 1.0
    """Weight of that loss."""
    coupling: Literal["flow", "independent"] = "flow"
    """Noise of an image in `matching`: the teacher's z of it, or drawn on its own: plain flow matching."""
    rms: tuple[float, ...] = ()
    """Root mean square of the teacher's states x⁰ … xᵀ = z; measured on training images where empty."""

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        for name in ("width", "layers"):
            size = getattr(self, name)
            require(size is None or 1 <= size <= _MOST[name], f"--student.{name} {size} is out of range.")
        for name in ("hidden_weight", "feature_weight", "guidance"):
            require(getattr(self, name) >= 0, f"--student.{name.replace('_', '-')} must not be negative.")
        require(self.clip > 0, "--student.clip must be above 0.")
        require(all(value > 0 for value in self.rms), "--student.rms must all be above 0.")
        inverse_only = self.guidance > 0 or self.features is not None
        require(
            self.method != "matching" or not inverse_only,
            "--student.guidance and --student.features belong to --student.method inverse; leave them out "
            "(a matching student is guided by two evaluations, without having learned it).",
        )
        require(
            self.method != "inverse" or self.coupling == "flow",
            "--student.coupling independent belongs to --student.method matching; choose that method.",
        )

    @property
    def active(self) -> bool:
        """Whether a student is trained, and not a flow."""
        return self.method != "none"


@dataclass(frozen=True)
class RunConfig(Checked):
    """All settings of a run, stored as `config.json` in its checkpoints."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their ids; empty: unconditional, or not known."""
    student: StudentConfig = field(default_factory=StudentConfig)

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        if self.data.path is not None and self.data.name == "digits":
            object.__setattr__(self, "data", dataclasses.replace(self.data, name="folder"))
        if self.student.active:
            require(
                self.train.init_from is None,
                "--train.init-from gives weights of a flow, and a student has others; leave it out.",
            )
            width = self.student.width or self.model.width
            require(
                width % self.model.head_dim == 0,
                f"--student.width {width} is not divisible by --model.head-dim {self.model.head_dim}; choose "
                "a multiple of it.",
            )
            require(not self.alignment.active, "A student is not aligned; give --alignment.strategy none.")
        if not self.alignment.active:
            return
        require(
            self.alignment.stop_below is None or self.train.diagnose_every > 0,
            "--alignment.stop-below needs --train.diagnose-every, the steps between two measurements.",
        )
        self._check_aligned_levels()
        known = set(self.model.locations)
        for block, layer in self.alignment.locations:
            require(
                (block, layer) in known,
                f"--alignment.locations: ({block}, {layer}) is outside the model; "
                f"{self.model.locations_in_words}.",
            )

    def _check_aligned_levels(self) -> None:
        if self.alignment.levels is None:
            return
        low, high = self.alignment.levels
        require(
            self.model.noise == "range",
            f"--alignment.levels {low:g} {high:g} needs a flow with a range of noise levels, --model.noise "
            "range; leave it out to align all images.",
        )
        require(
            low < self.model.noise_max and high > self.model.noise_min,
            f"--alignment.levels {low:g} {high:g} holds none of the flow's noise levels, "
            f"{self.model.noise_min:g} to {self.model.noise_max:g}; choose an interval that overlaps them.",
        )
