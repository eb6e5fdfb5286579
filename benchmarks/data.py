"""Preparing and loading of images: `flowback prepare` against a bare decode loop, batches, memory.

    python benchmarks/data.py --json docs/figures/data.json

The images are JPEGs of 400x300, crops of scikit-learn's two photographs. The bare loop opens each file with
Pillow, converts and resizes it as ADM does, and drops it: no list, no hash, no file. Both use one process for
each core and take turns. Batches come from the prepared set in random order, in one process, out of the page
cache. Memory is that of fresh processes, on all images and on a quarter of them.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowback.data.decode_pool import Settings
from flowback.data.prepared import load_prepared
from flowback.data.prepared_writer import prepare
from flowback.data.sources import FileSource
from flowback.devices import cpu_cores
from flowback.progress import track
from harness import interleave, peak_bytes, peak_in_fresh_process, write_rows

CORES = cpu_cores()
SIZE = 64
BATCH = 256
SETTINGS = Settings(SIZE, 3, "adm", 0.0)
CPU = torch.device("cpu")


def write_jpegs(folder: Path, first: int, until: int) -> int:
    """Images ``first`` ... ``until`` - 1: random crops of the two photographs, one class each."""
    from sklearn.datasets import load_sample_image

    pictures = [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    for index in range(first, until):
        rng = np.random.default_rng(index)
        top, left = rng.integers(0, 427 - 300), rng.integers(0, 640 - 400)
        crop = pictures[index % 2][top : top + 300, left : left + 400]
        Image.fromarray(crop).save(folder / str(index % 2) / f"{index:07d}.jpg", quality=90)
    return until - first


def generate(folder: Path, count: int) -> None:
    """``count`` JPEGs in two class folders."""
    for name in ("0", "1"):
        (folder / name).mkdir(parents=True)
    starts = range(0, count, 500)
    with ProcessPoolExecutor(CORES, get_context("fork")) as pool:
        spans = [(folder, start, min(start + 500, count)) for start in starts]
        for _ in track(pool.map(write_jpegs, *zip(*spans, strict=True)), count, "writing JPEGs", step=500):
            pass


def source(folder: Path, count: int) -> FileSource:
    """The first ``count`` images."""
    files = tuple(f"{index % 2}/{index:07d}.jpg" for index in range(count))
    labels = torch.arange(count) % 2
    return FileSource(("0", "1"), labels, folder, files)


def run_prepare(folder: Path, count: int, out: Path, keep: bool = False) -> None:
    """Prepare from nothing, with the checks at the end."""
    shutil.rmtree(out, ignore_errors=True)
    prepare({"train": source(folder, count)}, out, str(folder), SETTINGS, workers=CORES)
    if not keep:
        shutil.rmtree(out)


def bare(files: list[Path]) -> int:
    """Decode and resize, nothing else: 400x300 halves twice, then bicubic of the centre."""
    for file in files:
        with Image.open(file) as image:
            small = image.convert("RGB").resize((200, 150), Image.Resampling.BOX)
        small = small.resize((100, 75), Image.Resampling.BOX)
        pixels = np.asarray(small.resize((85, 64), Image.Resampling.BICUBIC).crop((10, 0, 74, 64)))
        assert pixels.shape == (SIZE, SIZE, 3)
    return len(files)


def run_bare(folder: Path, count: int) -> None:
    """The bare loop on all cores, 64 files a task."""
    files = [folder / file for file in source(folder, count).files]
    with ProcessPoolExecutor(CORES, get_context("fork")) as pool:
        parts = [files[start : start + 64] for start in range(0, count, 64)]
        assert sum(pool.map(bare, parts)) == count


def load_batches(out: Path, batches: int) -> float:
    """Images a second, in random batches of 256."""
    images = load_prepared(out, SIZE, 3, "train")
    order = torch.randint(len(images), (batches, BATCH), generator=torch.Generator().manual_seed(0))
    images.read(torch.arange(len(images)).split(BATCH)[0])
    started = time.perf_counter()
    for indices in order:
        images.read(indices)
    return batches * BATCH / (time.perf_counter() - started)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def measure_memory(kind: str, folder: Path, count: int, out: Path) -> int:
    """In a fresh process: growth of its memory while preparing, or while reading every image."""
    if kind == "prepare":
        own = peak_bytes(lambda: run_prepare(folder, count, out, keep=True), CPU)
        return own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    images = load_prepared(out, SIZE, 3, "train")
    before = anonymous_bytes()
    highest = 0
    for indices in torch.randperm(len(images)).split(BATCH):
        images.read(indices)
        highest = max(highest, anonymous_bytes())
    return highest - before


def main() -> None:
    """Measure all and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="number of JPEGs")
    parser.add_argument("--repeats", type=int, default=3, help="turns of prepare and of the bare loop")
    parser.add_argument("--batches", type=int, default=400, help="batches of 256 that are loaded")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        kind, folder, count, out = options.memory
        print(measure_memory(kind, Path(folder), int(count), Path(out)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, out, count = Path(place) / "jpegs", Path(place) / "set", options.images
        generate(folder, count)
        seconds = interleave(
            {
                "bare loop": lambda: run_bare(folder, count),
                "flowback prepare": lambda: run_prepare(folder, count, out),
            },
            CPU,
            options.repeats,
        )
        rates = {name: count / statistics.median(own) for name, own in seconds.items()}
        ratio = rates["flowback prepare"] / rates["bare loop"]
        memory = []
        for share in (4, 1):
            for kind in ("prepare", "load"):
                words = ["--memory", kind, str(folder), str(count // share), str(out)]
                memory.append({"what": kind, "images": count // share, "bytes": peak_in_fresh_process(words)})
        loading = [load_batches(out, options.batches) for _ in range(options.repeats)]
    for name, rate in rates.items():
        print(f"{name}: {rate:,.0f} images/s on {CORES} cores")
    print(f"prepare / bare loop: {ratio:.3f} (at least 0.9)")
    print(f"loading batches of {BATCH}: {statistics.median(loading):,.0f} images/s (at least 50,000)")
    for row in memory:
        print(f"memory, {row['what']} {row['images']:,} images: {int(row['bytes']) / 2**20:.1f} MiB")
    if options.json:
        rows = [
            {"what": name, "seconds": own, "images_per_second": rates[name]} for name, own in seconds.items()
        ]
        write_rows(
            options.json, CPU, rows, images=count, image_size=[400, 300], prepared_size=SIZE, cores=CORES,
            prepare_over_bare=ratio, memory=memory, loading_images_per_second=loading, batch=BATCH,
        )  # fmt: skip


if __name__ == "__main__":
    main()
