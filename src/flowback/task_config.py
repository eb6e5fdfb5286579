"""Settings of what is done with a trained flow: draw, measure, probe, and fill in the tables of the paper.

Frozen dataclasses as those of a run (:mod:`flowback.config`); a record of what was done holds them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowback.checked import Checked, require
from flowback.errors import InputError
from flowback.files import check_file

__all__ = ["EvaluateConfig", "FolderConfig", "ProbeConfig", "ReproduceConfig", "SampleConfig", "Scale"]

Scale = Literal["paper", "mini", "fashion"]
"""Sizes of a table's rows."""


@dataclass(frozen=True)
class SampleConfig(Checked):
    """How images are drawn; the same for `sample`, `evaluate`, `plan` and `reproduce`."""

    guidance: float = 0.0
    """Guidance scale w of c + w·(c − u); 0 is off."""
    ramp: bool = False
    """Let w grow from 0 to its full value over the tokens of each block."""
    formula: Literal["tarflow", "starflow"] = "tarflow"
    """Formula that combines the predictions with and without label."""
    attention_temperature: float = 1.0
    """Attention temperature of the stream without label; other than 1, it guides unconditional models too."""
    guided_blocks: int | None = None
    """Guide only this many blocks, those nearest the noise; None guides all."""
    denoise: bool = True
    """End with denoising by the flow's own score."""
    noise: float | None = None
    """Noise level to draw at, for flows trained over a range; None is the highest. Others have only one."""
    denoise_steps: int | None = None
    """Noise levels that denoising goes down; more than one needs a flow trained over a range (--model.noise
    range). None: 10 of such a flow, 1 of any other."""
    denoise_method: Literal["euler", "heun", "stochastic"] = "euler"
    """How to go from a level to the next; `heun` takes two passes for it, the others one."""
    denoise_spacing: Literal["linear", "log", "edm"] = "linear"
    """How the levels are spaced: evenly, evenly in their logarithms, or as EDM's."""
    denoise_last: float | None = None
    """Last noise level of denoising, which begins at the level of drawing; None is the lowest of training."""
    denoise_clamp: bool = False
    """Clamp each estimate of the clean image to [-1, 1]."""
    denoise_guidance: float = 0.0
    """Guidance scale of the estimates of the clean image, c + w·(c - u); 0 is off. It doubles their cost."""
    sampler: Literal["auto", "sequential", "jacobi", "student+exact"] = "sequential"
    """`auto`: the plan of `flowback plan` if it fits, else sequential; `jacobi`: windows in all blocks;
    `student+exact`, of a student: its teacher's images, by windows that start from the student's."""
    tolerance: float = 1e-3
    """`auto`: largest difference from the sequential images; `jacobi`: largest change in a last sweep."""
    window: int = 16
    """Tokens in a window of `--sampler jacobi` or `student+exact`."""
    precision: Literal["fp32", "kv-bf16", "bf16"] = "fp32"
    """Of weights, keys and values while decoding; `kv-bf16` narrows keys and values alone, which is faster on
    the CPU and a quarter as far from `fp32` as `bf16`; a student, which keeps none, takes it for `fp32`."""
    batch_size: int = 64
    """Images drawn at once by a process."""
    evaluations: int | None = None
    """Evaluations of a student for an image, guidance not counted; None: 1, or 4 of method matching."""
    solver: Literal["euler", "heun"] | None = None
    """Of a student of method matching; None: Euler up to 5 evaluations, Heun beyond."""
    teacher: str | None = None
    """A student's teacher, if it is no longer where the training found it."""

    def check(self) -> None:
        """Refuse values out of range."""
        require(self.batch_size >= 1, "--batch-size must be at least 1.")
        require(
            self.evaluations is None or self.evaluations >= 1,
            f"--evaluations {self.evaluations} must be at least 1.",
        )
        require(self.window >= 1, "--window must be at least 1.")
        require(
            self.formula != "starflow" or self.guidance >= -1,
            f"--guidance {self.guidance:g} must be at least -1 with --formula starflow.",
        )
        require(self.attention_temperature > 0, "--attention-temperature must be above 0.")
        require(
            self.guided_blocks is None or self.guided_blocks >= 0, "--guided-blocks must not be negative."
        )
        require(self.tolerance > 0, f"--tolerance {self.tolerance:g} must be above 0 (1e-3, say).")
        self._check_denoising()

    def _check_denoising(self) -> None:
        steps, first, last = self.denoise_steps, self.noise, self.denoise_last
        require(steps is None or steps >= 1, f"--denoise-steps is {steps}; it must be at least 1.")
        options = (steps, last, self.denoise_guidance or None, self.denoise_clamp or None)
        require(
            self.denoise or all(option is None for option in options),
            "--no-denoise leaves out what the other --denoise options describe; give either.",
        )
        require(last is None or last > 0, "--denoise-last must be above 0.")
        require(
            first is None or last is None or last < first,
            f"Noise levels from --noise {first} to --denoise-last {last} do not decrease; lower the last.",
        )

    @property
    def exact(self) -> SampleConfig:
        """The same of a flow, one token after another: what a student is compared with."""
        return dataclasses.replace(self, sampler="sequential", evaluations=None, solver=None)


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """What to measure; :class:`SampleConfig` says how samples are drawn."""

    samples: int = 1024
    """Samples to draw, with the classes in turn; 0 for none."""
    search: tuple[float, ...] = ()
    """Guidance scales to try instead of one; samples are drawn for each, from the same noise."""
    protocol: Literal["none", "adm", "tarflow"] = "none"
    """Figures in Inception features: ADM's (FID, sFID, IS, precision, recall), TARFlow's FID, or none."""
    inception_weights: Path | None = None
    """Local file of the Inception weights, instead of a download."""
    reference_limit: int | Literal["auto"] | None = "auto"
    """Compare with only this many images of the reference, spread evenly; None: all. `auto`: 10 for each
    sample and at least 2,000 with the protocol `none`; all with the others, which publish figures."""
    likelihood: bool = True
    """Measure nll and bits/dim of the test images."""
    classification: bool = True
    """Measure the accuracy of training-free classification of the test images."""
    draws: int = 3
    """Noise draws per image for the likelihood."""
    level: float | None = None
    """Noise level of the test images, for a flow trained over a range; None is the geometric middle."""
    limit: int | None = None
    """Use only this many test images for likelihood and classification, spread evenly."""
    seed: int = 0
    """Seed of the first sample and of the noise on the first test image."""
    vae: str | None = None
    """Folder or hub name of the VAE, instead of the one named in the checkpoint; for latents only."""
    force_vae: bool = False
    """Decode even if the VAE's weights are not those of training."""

    def check(self) -> None:
        """Refuse values out of range."""
        require(
            self.samples == 0 or self.samples >= 2,
            "--samples must be 0, or at least 2: a covariance needs two.",
        )
        require(
            not isinstance(self.reference_limit, int) or self.reference_limit >= 2,
            "--reference-limit must be at least 2: a covariance needs two.",
        )
        require(self.draws >= 1, "--draws must be at least 1.")
        require(self.limit is None or self.limit >= 1, "--limit must be at least 1.")
        last = 2**32 - max(self.samples, 1)
        require(0 <= self.seed <= last, f"--seed {self.seed} is out of range; it goes from 0 to {last}.")
        require(
            len(set(self.search)) == len(self.search), "--search repeats a guidance scale; give each once."
        )


@dataclass(frozen=True)
class ProbeConfig(Checked):
    """What `probe` measures."""

    locations: tuple[tuple[int, int], ...] = ()
    """(block, layer) pairs, counted from 1; none given: all."""
    train_limit: int | None = 5000
    """Use at most this many training images, spread evenly."""
    test_limit: int | None = None
    """Use at most this many test images, spread evenly."""
    encoder: str | None = "efficientnet_lite0"
    """Encoder of the CKNNA column: `efficientnet_lite0`, `timm:NAME`, or None for no such column."""
    encoder_weights: Path | None = None
    """Local file of the encoder's weights, instead of a download."""
    seed: int = 0
    """Seed of the noise on the images, and of the split that chooses the penalty."""
    batch_size: int = 64
    """Images per batch."""

    def check(self) -> None:
        """Refuse values out of range."""
        limits = (limit for limit in (self.train_limit, self.test_limit) if limit is not None)
        require(
            min(self.batch_size, *limits) >= 1,
            "--batch-size, --train-limit and --test-limit must be at least 1.",
        )
        require(0 <= self.seed < 2**32, f"--seed {self.seed} is out of range; it goes from 0 to {2**32 - 1}.")


@dataclass(frozen=True)
class FolderConfig(Checked):
    """What is drawn, and into which files."""

    count: int = 16
    """Number of images, over all labels."""
    labels: tuple[str | int, ...] = ()
    """Classes to draw, in turn, by name or id; none given: all classes in turn. A number is an id, unless
    it is the name of a class."""
    unconditional: bool = False
    """Draw without labels from a model with classes."""
    seed: int = 0
    """Seed of the first image."""
    redraws: int = 3
    """How often an image with non-finite values is drawn again."""
    grid: Path | None = None
    """Also write all images as one picture, classes in rows."""
    npz: Path | None = None
    """Also write all images as the file that ADM's evaluator reads."""
    trajectory: Path | None = None
    """Also write the picture of the way from noise to image, for the first 8 images."""
    compare: Path | None = None
    """Of a student: also write its first 8 images beside those of its teacher, from the same noise, and the
    difference (grey: none)."""

    def check(self) -> None:
        """Refuse values out of range, and those that do not go together."""
        require(self.count >= 1, "--count must be at least 1.")
        require(self.redraws >= 0, "--redraws must not be negative.")
        last = 2**32 - self.count
        require(0 <= self.seed <= last, f"--seed {self.seed} is out of range; it goes from 0 to {last}.")
        require(
            not (self.labels and self.unconditional),
            "--labels and --unconditional exclude each other; give one of them.",
        )
        require(
            len(self.labels) <= self.count,
            f"{len(self.labels)} labels for {self.count} images; raise --count.",
        )
        for name in ("grid", "npz", "trajectory", "compare"):
            path = getattr(self, name)
            if path is not None:
                check_file(path, f"--{name}")

    def check_place(self, out: Path) -> None:
        """Refuse pictures among the images, where they would count as two of them."""
        for name in ("grid", "trajectory", "compare"):
            path = getattr(self, name)
            if path is not None and out.resolve() in path.resolve().parents:
                raise InputError(f"--{name} {path} lies in {out}, among the images; give another place.")


@dataclass(frozen=True)
class ReproduceConfig(Checked):
    """How a table is filled in."""

    rows: tuple[str, ...] = ()
    """Only the rows of these presets; `*` and `?` are allowed. None given: all rows."""
    baseline: str | None = None
    """The row that all others are compared with. None: the last row above without alignment, or the first."""
    data: Path | None = None
    """The prepared set, or the folder of images; small scales know their own."""
    latents: Path | None = None
    """The prepared latents of 256×256 images, for the rows in latents."""
    samples: int | None = None
    """Samples of each evaluation; None: 1,000 at small scales, else as many as in the paper."""
    guidance: float | None = None
    """Guidance scale; None: 0.3 at small scales, else the best of 0, 0.5, ... 4, as in the paper."""
    search: tuple[float, ...] = ()
    """Guidance scales to try instead of one; the table shows the figures of the best."""
    inception_weights: Path | None = None
    """Local file of the Inception weights: adds ADM's FID, sFID and IS."""
    steps: int | None = None
    """Training steps instead of the preset's, to try the command out."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    jobs: int = 1
    """Rows that run at once, each in a process of its own with an equal share of the cores."""
    redo: bool = False
    """Remove runs with other settings, and train them again."""
    any_code: bool = False
    """Take runs and records of other versions of the code too; the table says which commits it is of."""
    note: tuple[str, ...] = ()
    """Sentences to print under the table: what it supports, and what it does not."""

    def check(self) -> None:
        """Refuse values out of range."""
        require(self.jobs >= 1, "--jobs must be at least 1.")
        require(self.samples is None or self.samples >= 2, "--samples must be at least 2.")
        require(self.steps is None or self.steps >= 1, "--steps must be at least 1.")
        require(
            self.guidance is None or not self.search, "--guidance is one scale, --search several; give one."
        )
