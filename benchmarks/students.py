"""Seconds of a batch of images: a flow's exact sampler, its students, and apple/ml-tarflow's sampler.

    python benchmarks/students.py TEACHER STUDENT --matching STUDENT --reference ML_TARFLOW --json FILE

All draw clean images of the same labels and noise, and take turns; the median counts. The exact sampler ends
with its denoising step, as ml-tarflow's sampling script does; students need none, since they learn clean
images. ``ratio`` is the time of ``exact`` over that of the row, ``evaluations`` how often a network runs. The
rows ``sweeps-*`` count sweeps a window of the exact windowed sampler, from z and from the student.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from flowback import Flow, Sampler, Student
from flowback.errors import InputError
from flowback.evaluation.report import Report, weights_of
from flowback.sampling.denoise import denoise
from flowback.sampling.jacobi import jacobi
from flowback.sampling.sampler import noise
from flowback.students.refine import StudentGuess
from flowback.students.sampler import StudentSampler
from harness import interleave, write_rows
from sampling import reference_model


@dataclass(frozen=True)
class Options:
    """Time the samplers."""

    teacher: tyro.conf.Positional[Path]
    """The flow."""
    student: tyro.conf.Positional[Path]
    """Its student of method inverse."""
    json: Path
    """The file to write."""
    matching: Path | None = None
    """Its student of method matching."""
    evaluations: int = 4
    """Of the matching student."""
    reference: Path | None = None
    """A checkout of apple/ml-tarflow to compare with."""
    records: tuple[Path, ...] = ()
    """Reports of ``flowback evaluate`` to keep beside the rows, by the names of their files."""
    batches: tuple[int, ...] = (16,)
    """Images drawn at once."""
    window: int = 16
    """Tokens in a window, where sweeps are counted."""
    tolerance: float = 1e-3
    """Largest change in a last sweep."""
    warm_up: int = 1
    """Calls of each that are not timed."""
    repeats: int = 7
    """Times that each call is timed; the median is kept."""
    process_time: bool = False
    """Count processor time, not wall time: for a machine that others use too, with OMP_NUM_THREADS=1."""


def labels_of(flow: Flow, count: int) -> Tensor | None:
    """The classes in turn."""
    classes = flow.config.num_classes
    return torch.arange(count) % classes if classes else None


def time_batch(
    flow: Flow, inverse: Student, matching: Student | None, reference: Any, options: Options, batch: int
) -> list[dict[str, Any]]:
    """Rows for one batch size."""
    seeds, labels = range(batch), labels_of(flow, batch)
    z = noise(flow, seeds)
    exact = Sampler(flow, batch_size=batch)
    calls: dict[str, Callable[[], object]] = {f"exact-b{batch}": lambda: exact(labels, seeds)}
    one = StudentSampler(inverse, batch_size=batch)
    calls[f"student-b{batch}"] = lambda: one(labels, seeds)
    count = {f"student-b{batch}": 1}
    if matching is not None:
        few = StudentSampler(matching, evaluations=options.evaluations, batch_size=batch)
        name = f"matching-{options.evaluations}-b{batch}"
        calls[name], count[name] = lambda: few(labels, seeds), options.evaluations
    if reference is not None:

        def theirs() -> Tensor:
            with torch.no_grad():  # their sampler writes into its argument
                images = reference.reverse(z.clone(), labels)
            return denoise(flow, images, labels)

        calls[f"ml-tarflow-b{batch}"] = theirs
    clock = time.process_time if options.process_time else time.perf_counter
    seconds = interleave(calls, flow.device, options.repeats, options.warm_up, clock=clock)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "name": name,
            "seconds": value,
            "ratio": median[f"exact-b{batch}"] / value,
            "images_per_second": batch / value,
            "evaluations": count.get(name),
            "all_seconds": seconds[name],
        }
        for name, value in median.items()
    ]


@torch.no_grad()
def count_sweeps(flow: Flow, student: Student, options: Options, batch: int) -> list[dict[str, Any]]:
    """Mean sweeps a window in each block, from z and from the student; block 1 is next to the data."""
    labels = labels_of(flow, batch)
    sampler = Sampler(flow, denoise=False, batch_size=batch)
    scales = torch.zeros(batch)
    z, window = noise(flow, range(batch)), min(options.window, flow.config.tokens)
    guesses = StudentGuess(flow, StudentSampler(student, batch_size=batch))(z, labels, scales)
    found: dict[str, list[float]] = {"z": [], "student": []}
    for index, guess in zip(range(flow.config.blocks, 0, -1), guesses, strict=True):
        block = flow.blocks[index - 1]
        decoder = sampler.decoder(index, labels, scales, 2 * window)
        inside = block.reorder(z)
        from_student = jacobi(decoder, inside, window, options.tolerance, block.reorder(guess))
        from_z = jacobi(decoder, inside, window, options.tolerance)
        found["student"].append(float(from_student.sweeps.mean()))
        found["z"].append(float(from_z.sweeps.mean()))
        z = block.reorder(from_student.x)
    return [
        {"name": f"sweeps-from-{start}-b{batch}", "sweeps": sum(each) / len(each), "by_block": each[::-1]}
        for start, each in found.items()
    ]


def main() -> None:
    """Load, time, count, write."""
    options = tyro.cli(Options)
    flow, inverse = Flow.from_pretrained(options.teacher), Student.from_pretrained(options.student)
    matching = None if options.matching is None else Student.from_pretrained(options.matching)
    for student in (inverse, matching):
        if student is not None and student.student.teacher_weights != weights_of(flow)["weights_sha256"]:
            raise InputError(f"{student.folder} is not a student of {options.teacher}; give its own teacher.")
    reference = None if options.reference is None else reference_model(options.reference, flow)
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        rows += time_batch(flow, inverse, matching, reference, options, batch)
        rows += count_sweeps(flow, inverse, options, batch)
    for row in rows:
        print(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{v}"
                for k, v in row.items()
                if k != "all_seconds"
            )
        )
    weights = {"teacher": weights_of(flow), "student": weights_of(inverse)}
    if matching is not None:
        weights["matching"] = weights_of(matching)
    records = {file.stem: Report.load(file).to_dict() for file in options.records}
    write_rows(options.json, flow.device, rows, settings=asdict(options), weights=weights, records=records)


if __name__ == "__main__":
    main()
