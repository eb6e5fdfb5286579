"""What the benchmarks share: interleaved timing, peak memory in a fresh process, one form of JSON."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowback.files import write_json
from flowback.provenance import environment

__all__ = ["interleave", "peak_bytes", "peak_in_fresh_process", "write_rows"]


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warm_up: int = 1,
    once: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call. All calls take turns, so that slow drifts of the machine meet all alike.

    Args:
        calls: what to time, by name.
        device: waited for before the clock is read.
        repeats: turns that count.
        warm_up: turns before them.
        once: calls too slow to repeat; they take part in the middle turn only, without warm-up.
        clock: wall time, or ``time.process_time`` on a machine that others use, too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm_up, repeats):
        for name, call in calls.items():
            if name in once and turn != repeats // 2:
                continue
            _wait(device)
            start = clock()
            call()
            _wait(device)
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Highest memory during ``call``, less that before it.

    CUDA: PyTorch's allocator. Elsewhere: resident memory of the process, by Linux's high-water mark; run
    it in a fresh process, whose heap holds no free memory for the call to reuse.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to the present
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def peak_in_fresh_process(arguments: Sequence[str]) -> int:
    """The number that this script prints last when it is called with ``arguments``."""
    run = subprocess.run(
        [sys.executable, sys.argv[0], *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def write_rows(path: Path, device: torch.device, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """The JSON of a benchmark: environment, rows, and what else it measured."""
    write_json(path, {"environment": environment(device), **more, "rows": list(rows)})


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
