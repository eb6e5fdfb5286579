"""The tables and figures of arXiv 2511.22345 by their numbers: rows, and what the paper published for them.

A figure of the paper stands in the table it comes from, even where two tables differ: Table 1 gives 57.35 %
where Table 2 gives 57.76 % for the same row. Accuracies (`top1`) are in per cent; `fid`, `sfid` and `is` are
ADM's, from as many samples as the table says. All are single runs: the paper gives no spread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["MEASURED", "TABLES", "PaperTable", "published"]


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper."""

    title: str
    figures: tuple[str, ...]
    """The paper's columns."""
    rows: tuple[tuple[str | float | None, ...], ...]
    """Preset and figures; the first row is the one that the others are compared with."""
    fashion: tuple[str, ...] = ()
    """The presets that stand for the rows at the scale `fashion`."""
    samples: int = 4096
    """Images drawn for each of the paper's figures."""
    kind: Literal["quality", "probe", "shown"] = "quality"
    """What a row takes: an evaluation, linear probes at every location, or nothing to run at all."""
    search: tuple[float, ...] = ()
    """Guidance scales, where the table is about them."""
    note: str = ""
    """What a reader must know to compare."""
    panels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows of each panel, of a figure that has several."""

    @property
    def presets(self) -> tuple[str, ...]:
        """The rows' presets, in order."""
        return tuple(str(name) for name, *_ in self.rows)

    def figures_of(self, preset: str) -> dict[str, float]:
        """What the paper published for a row."""
        for name, *values in self.rows:
            if name == preset:
                pairs = zip(self.figures, values, strict=False)
                return {key: float(value) for key, value in pairs if value is not None}
        return {}


TABLES: dict[str, PaperTable] = {
    "table1": PaperTable(
        "Strategies, 64×64, 400k steps",
        ("fid", "sfid", "is", "top1"),
        (
            ("imagenet64", 12.91, 33.79, 36.62, 37.43),
            ("imagenet64-forward-all-2", 12.25, 37.97, 40.85, 46.97),
            ("imagenet64-detach-all-2", 12.19, 34.31, 41.98, 49.06),
            ("imagenet64-reverse-all-2", 12.21, 33.80, 42.08, 49.91),
            ("imagenet64-forward-first-2", 12.67, 39.99, 41.11, 61.16),
            ("imagenet64-detach-first-2", 12.73, 33.84, 37.81, 61.63),
            ("imagenet64-detach-last-2", 12.12, 34.00, 41.18, 55.14),
            ("imagenet64-reverse-last-2", 11.93, 33.78, 40.90, 55.21),
            ("imagenet64-reverse-last-4", 11.84, 33.61, 46.06, 58.91),
            ("imagenet64-reverse", 11.71, 33.68, 44.31, 57.35),
        ),
        fashion=(
            "fashion",
            *("fashion-forward-all", "fashion-detach-all", "fashion-reverse-all", "fashion-exact-all"),
            *("fashion-forward-first", "fashion-detach-first"),
            *("fashion-reverse-first", "fashion-exact-first"),
            *("fashion-forward-last", "fashion-detach-last", "fashion-reverse-last", "fashion-exact-last"),
            *("fashion-reverse-last-1", "fashion-detach-4", "fashion-reverse-4", "fashion-exact-4"),
        ),
    ),
    "table2": PaperTable(
        "Progress, 64×64 and 256×256",
        ("fid", "top1"),
        (
            ("imagenet64-1000k", 11.76, 39.97),
            ("imagenet64-reverse", 11.71, 57.76),
            ("imagenet64-reverse-600k", 11.53, 57.75),
            ("imagenet64-reverse-800k", 11.48, 57.65),
            ("imagenet64-reverse-1000k", 11.25, 57.02),
            ("imagenet256", 13.82, 45.97),
            ("imagenet256-1000k", 13.05, 40.22),
            ("imagenet256-reverse", 13.26, 57.85),
            ("imagenet256-reverse-1000k", 12.79, 56.24),
        ),
        fashion=(
            *("fashion", "fashion-reverse-last-800", "fashion-reverse-last-1200"),
            *("fashion-reverse-last-1600", "fashion-reverse-last"),
        ),
        note="Each row is a run of its own, whose learning rate ends with it.",
    ),
    "table3": PaperTable(
        "64×64, 50,000 samples",
        ("fid", "sfid"),
        (("imagenet64-1000k", 4.21, 5.34), ("imagenet64-reverse-1000k", 3.69, 4.34)),
        fashion=("fashion", "fashion-reverse-last"),
        samples=50_000,
        note="The paper does not name the steps. Its appendix B.4 says that final models run 1M; "
        "that these are such models is our reading.",
    ),
    "table4": PaperTable(
        "256×256, 50,000 samples",
        ("fid", "sfid", "is"),
        (
            ("imagenet256-1000k", 5.15, 6.78, 243.49),
            ("imagenet256-reverse-1000k", 4.95, 6.89, 234.99),
            ("imagenet256-reverse-patch1-1000k", 4.18, 4.96, 240.8),
        ),
        samples=50_000,
        note="The paper does not name the steps. Its appendix B.4 says that final models run 1M; "
        "that these are such models is our reading.",
    ),
    "table5": PaperTable(
        "Training speed, two aligned blocks",
        ("iterations_per_second",),
        (
            ("imagenet64-forward-last-2", 2.11),
            ("imagenet64-detach-last-2", 1.93),
            ("imagenet64-reverse-last-2", 1.87),
        ),
        kind="shown",
        note="On the paper's 8 GPUs. benchmarks/alignment_step.py times the same strategies on your machine.",
    ),
    "table6": PaperTable(
        "Settings",
        ("batch_size", "lr", "weight_decay", "ema_decay", "weight"),
        (
            ("imagenet64-reverse", 256, 1e-4, 1e-4, 0.9999, 0.1),
            ("imagenet256-reverse", 256, 1e-4, 1e-4, 0.9999, 0.1),
        ),
        kind="shown",
        note="AdamW with betas 0.9 and 0.95; weight is that of the alignment loss, a cosine similarity.",
    ),
    "table7": PaperTable(
        "Layer, 64×64, detach",
        ("fid", "sfid", "top1"),
        (
            ("imagenet64-detach-all-2", 12.19, 34.31, 49.00),
            ("imagenet64-detach-all-4", 12.14, 33.97, 54.14),
            ("imagenet64-detach-all-6", 12.37, 34.32, 54.98),
        ),
        fashion=("fashion-detach-all-1", "fashion-detach-all"),
    ),
    "table8": PaperTable(
        "Encoders, 64×64, reverse",
        ("fid", "sfid", "is", "top1"),
        (
            ("imagenet64-reverse-clip-b", 12.41, 33.99, 41.99, 38.99),
            ("imagenet64-reverse-mae-b", 12.32, 34.00, 39.69, 37.57),
            ("imagenet64-reverse", 11.71, 33.68, 44.31, 57.35),
            ("imagenet64-reverse-dinov2-l", 11.74, 33.87, 45.00, 58.80),
        ),
        fashion=(
            *("fashion-reverse-last", "fashion-reverse-last-clip-b"),
            *("fashion-reverse-last-mae-b", "fashion-reverse-last-dinov2-b"),
        ),
    ),
    "table9": PaperTable(
        "Weight of the alignment, 256×256, 400k steps",
        ("fid",),
        (
            ("imagenet256", 13.82),
            ("imagenet256-reverse", 13.26),
            ("imagenet256-reverse-weight0.5", 13.74),
        ),
        fashion=(
            *("fashion", "fashion-reverse-last-weight0.03", "fashion-reverse-last-weight0.1"),
            *("fashion-reverse-last", "fashion-reverse-last-weight1"),
        ),
    ),
    "figure4": PaperTable(
        "Linear probe by location, and the training-free score",
        (),
        (("imagenet64",), ("imagenet64-reverse",)),
        fashion=("fashion", "fashion-reverse-last"),
        kind="probe",
        note="The paper's locations are (1,2), (1,8), (2,6), (3,4), (4,2), (4,8), (5,6), (6,4), (7,2), (7,8) "
        "and (8,6); here every block and layer is probed.",
    ),
    "figure5": PaperTable(
        "Guidance, noise, and convergence",
        (),
        (
            *(("imagenet64",), ("imagenet64-forward-first-2",), ("imagenet64-detach-first-2",)),
            *(("imagenet64-detach-last-2",), ("imagenet64-reverse-last-2",)),
            *(("imagenet256-noise0.1",), ("imagenet256-noise0.15",), ("imagenet256",)),
            *(("imagenet256-noise0.25",), ("imagenet256-noise0.3",), ("imagenet256-reverse",)),
        ),
        fashion=(
            *("fashion", "fashion-forward-first", "fashion-detach-first"),
            *("fashion-detach-last", "fashion-reverse-last"),
            *("fashion-noise0.05", "fashion-noise0.15", "fashion-noise0.2"),
        ),
        search=(1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5),
        panels={
            "guidance": (
                *("imagenet64", "imagenet64-forward-first-2", "imagenet64-detach-first-2"),
                *("imagenet64-detach-last-2", "imagenet64-reverse-last-2"),
            ),
            "noise": (
                *("imagenet256-noise0.1", "imagenet256-noise0.15", "imagenet256"),
                *("imagenet256-noise0.25", "imagenet256-noise0.3"),
            ),
            "convergence": ("imagenet256", "imagenet256-reverse"),
        },
        note="The paper finds guidance near 3.1 and noise 0.2 best, and the aligned run 3.3 times faster; "
        "it draws curves and gives no further numbers.",
    ),
    "tarflow": PaperTable(
        "TARFlow's own models (arXiv 2412.06329)",
        ("fid",),
        (
            ("tarflow-imagenet64",),
            ("tarflow-imagenet64-patch4", 3.99),
            ("tarflow-imagenet64-uncond",),
            ("tarflow-imagenet64-bpd",),
            ("tarflow-imagenet128",),
            ("tarflow-afhq256",),
        ),
        samples=50_000,
        note="Settings are those of the commands in apple/ml-tarflow. Budget and FID of patch 4 are what the "
        "authors wrote there in issue 7; it is TARFlow's own FID, at guidance 1.7.",
    ),
}
"""By the paper's own names."""


def published(preset: str) -> dict[str, float]:
    """What the paper says of a preset; `fid_50k` and so on from 50,000 samples.

    Where tables differ, the first one's.
    """
    found: dict[str, float] = {}
    for table in TABLES.values():
        suffix = "_50k" if table.samples == 50_000 else ""
        for key, value in table.figures_of(preset).items() if table.kind == "quality" else ():
            found.setdefault(key + (suffix if key != "top1" else ""), value)
    return found


_METRICS = ("nll", "top1", "top1_exhaustive", "fd_efficientnet_lite0")

# nll of noised test images (nats/dim), accuracy of the gradient and of the exhaustive rule (%), and Fréchet
# distance of 1,000 samples, guidance 0.3; seed 0, on a CPU (docs/results.md names the runs).
_ROWS = (
    ("digits", -0.1485, 87.2, 95.0, 48.9),
    ("digits-reverse", -0.1484, 84.4, 96.7, 44.7),
    ("imagenet64-mini", -0.0884, 70.3, 86.1, 71.6),
    ("imagenet64-forward-all-2-mini", -0.0857, 74.4, 85.6, 74.7),
    ("imagenet64-detach-all-2-mini", -0.0892, 66.1, 85.8, 71.1),
    ("imagenet64-detach-all-4-mini", -0.0893, 72.2, 86.9, 71.8),
    ("imagenet64-detach-all-6-mini", -0.0950, 69.4, 87.5, 71.8),
    ("imagenet64-reverse-all-2-mini", -0.0870, 71.4, 86.1, 71.5),
    ("imagenet64-forward-first-2-mini", -0.0893, 69.2, 86.7, 69.1),
    ("imagenet64-detach-first-2-mini", -0.0884, 70.3, 84.7, 71.0),
    ("imagenet64-detach-last-2-mini", -0.0893, 70.6, 87.2, 75.0),
    ("imagenet64-reverse-last-2-mini", -0.0877, 69.7, 84.4, 72.7),
    ("imagenet64-reverse-last-4-mini", -0.0935, 76.1, 86.4, 74.3),
    ("imagenet64-reverse-mini", -0.0946, 73.9, 84.2, 72.0),
)

MEASURED: dict[str, dict[str, float]] = {
    name: dict(zip(_METRICS, figures, strict=True)) for name, *figures in _ROWS
}
"""What this project measured, by preset."""
