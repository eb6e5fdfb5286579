"""Evaluation: memory of statistics, speed of features, probe and classification; torch-fidelity beside them.

Weights are random: speed and arithmetic do not depend on them.

    python benchmarks/evaluation.py --json out.json
    python benchmarks/evaluation.py --agreement 1000 --json out.json    # compare figures as well
    python benchmarks/evaluation.py --process-time                      # on a machine that others use, too
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.fidelity import calculate_metrics
from torch_fidelity.utils import get_featuresdict_from_dataset

from flowback import Flow, ModelConfig, classify
from flowback.data.image_set import MemoryImages
from flowback.data.pixels import to_unit_range
from flowback.evaluation.inception import Inception, load_inception
from flowback.evaluation.linear_probe import all_locations, features
from flowback.evaluation.metrics import Moments
from flowback.evaluation.protocol import InceptionStatistics, adm_figures
from flowback.flow.likelihood import add_noise
from harness import interleave, peak_bytes, peak_in_fresh_process, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from random_inception import random_weights  # type: ignore[import-not-found]

ROWS, DIM = 50_000, 2048


class Pictures(Dataset):
    """Images as torch-fidelity reads them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def crops(count: int, seed: int, noise: float = 0.0) -> Tensor:
    """Crops, 64 × 64, of scikit-learn's two photographs, with noise of so many grey levels."""
    generator = torch.Generator().manual_seed(seed)
    photos = [torch.from_numpy(load_sample_image(f"{name}.jpg").copy()) for name in ("flower", "china")]
    found = []
    for index in range(count):
        photo = photos[index % 2].permute(2, 0, 1)
        top, left = (int(torch.randint(0, side - 64, (), generator=generator)) for side in photo.shape[1:])
        found.append(photo[:, top : top + 64, left : left + 64])
    pixels = torch.stack(found).float()
    return (pixels + noise * torch.randn(pixels.shape, generator=generator)).round().clamp(0, 255).byte()


def stream_statistics() -> None:
    """Statistics of 50,000 rows that are never held together."""
    moments = Moments(DIM)
    for _ in range(ROWS // 1000):
        moments.add(torch.randn(1000, DIM))


def random_flow(classes: int, **changes: Any) -> Flow:
    """A flow that is no identity."""
    flow = Flow(ModelConfig(num_classes=classes, **changes)).eval()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return flow


def extraction(
    inception: Inception, weights: Path, device: torch.device, count: int, repeats: int
) -> list[dict[str, Any]]:
    """Our pass over images, with all that ADM's protocol gathers, and torch-fidelity's loop."""
    pixels = crops(count, seed=0)
    original = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    ).to(device)

    def ours() -> None:
        made = InceptionStatistics(inception, count, scores=True, rows=count)
        for batch in pixels.split(32):
            made.add(batch)

    def theirs() -> None:
        cuda = device.type == "cuda"
        get_featuresdict_from_dataset(Pictures(pixels), original, 32, cuda, cuda is False, False)

    seconds = timed({"features, flowback": ours, "features, torch-fidelity": theirs}, device, repeats)
    return rows_of(seconds, "features, torch-fidelity", images=count)


def probing(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Features of all 32 locations of an 8 × 4 flow, and a plain forward pass over the same images."""
    flow = random_flow(10, image_size=32, patch_size=4, width=128, blocks=8, layers=4, head_dim=64).to(device)
    images = MemoryImages("photos", (), None, crops(64, seed=1)[:, :, ::2, ::2].contiguous())
    locations = all_locations(flow)

    @torch.no_grad()
    def plain() -> None:
        for index in torch.arange(len(images)).split(32):
            flow(add_noise(to_unit_range(images.read(index)).to(device), flow.config, index.tolist()))

    calls = {
        "probe, 32 locations": lambda: features(flow, images, locations, batch_size=32),
        "forward": plain,
    }
    return rows_of(timed(calls, device, repeats), "forward", images=len(images))


def classification(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The gradient rule for 10 and 1000 classes, the exhaustive one for 10, and a plain forward pass."""
    size = {"image_size": 32, "patch_size": 4, "width": 128, "blocks": 4, "layers": 4, "head_dim": 64}
    few, many = random_flow(10, **size).to(device), random_flow(1000, **size).to(device)
    images = to_unit_range(crops(32, seed=2)[:, :, ::2, ::2].contiguous()).to(device)
    with torch.no_grad():
        calls: dict[str, Callable[[], object]] = {
            "forward (classes)": lambda: few(images),
            "gradient rule, 10 classes": lambda: classify(few, images),
            "gradient rule, 1000 classes": lambda: classify(many, images),
            "exhaustive rule, 10 classes": lambda: classify(few, images, "exhaustive"),
        }
        return rows_of(timed(calls, device, repeats), "forward (classes)", images=32)


def timed(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, by the clock that was asked for."""
    clock = time.process_time if "--process-time" in sys.argv else time.perf_counter
    return interleave(calls, device, repeats, clock=clock)


def rows_of(seconds: dict[str, list[float]], base: str, **more: Any) -> list[dict[str, Any]]:
    """Medians, and their ratio to that of ``base``."""
    medians = {name: median(values) for name, values in seconds.items()}
    return [
        {"name": name, "seconds": value, "ratio": value / medians[base], **more}
        for name, value in medians.items()
    ]


def agreement(inception: Inception, weights: Path, device: torch.device, count: int) -> dict[str, Any]:
    """FID, IS, precision and recall of both libraries on real and distorted images."""
    real, distorted = crops(count, seed=3), crops(count, seed=4, noise=12)
    theirs = calculate_metrics(
        input1=Pictures(distorted),
        input2=Pictures(real),
        cuda=device.type == "cuda",
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=32,
        fid=True,
        isc=True,
        prc=True,
        samples_shuffle=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
    )
    sets = []
    for pixels in (distorted, real):
        made = InceptionStatistics(inception, count, scores=True, rows=count)
        for batch in pixels.split(32):
            made.add(batch)
        sets.append(made)
    ours = adm_figures(*sets)
    names = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    return {name: {"flowback": ours[name], "torch-fidelity": theirs[their]} for name, their in names.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=64, help="images of the feature extraction")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--agreement", type=int, default=0, help="compare figures on so many images of each kind"
    )
    parser.add_argument("--process-time", action="store_true", help="measure CPU time, not wall time")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak:
        print(peak_bytes(stream_statistics, torch.device("cpu")))
        return
    print(f"device: {device}, {torch.get_num_threads()} threads")
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(random_weights(), weights)
        inception = load_inception(weights, device)
        if options.agreement:
            more["agreement"] = agreement(inception, weights, device, options.agreement)
            for name, pair in more["agreement"].items():
                print(name, pair)
        rows += extraction(inception, weights, device, options.images, options.repeats)
    rows += probing(device, options.repeats) + classification(device, options.repeats)
    peak = peak_in_fresh_process(["--peak"])
    rows.append({"name": f"statistics of {ROWS} x {DIM}", "peak_bytes": peak})
    for row in rows:
        print(row)
    if options.json:
        write_rows(options.json, device, rows, clock="process" if options.process_time else "wall", **more)


if __name__ == "__main__":
    main()
