"""What this project measured, by preset: seed 0, on a CPU; docs/results.md and README.md name the runs."""

from __future__ import annotations

__all__ = ["MEASURED"]

_METRICS = ("nll", "top1", "top1_exhaustive", "fd_efficientnet_lite0")

# nll of noised test images (nats/dim), accuracy of the gradient and of the exhaustive rule (%), and Fréchet
# distance of 1,000 samples, guidance 0.3.
_ROWS = (
    ("digits", -0.1475, 86.4, 93.6, 48.9),
    ("digits-reverse", -0.1494, 85.0, 95.3, 44.9),
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
