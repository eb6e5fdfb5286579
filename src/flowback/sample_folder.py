"""A folder of samples, drawn by any number of processes, which can be stopped and continued.

Images are drawn in fixed batches: batch k holds images k·B ... (k+1)·B − 1 whoever draws it, so that an image
is the same to the byte whether or not the run was interrupted, and for every number of processes that compute
with the same number of threads.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from flowback.config import RunConfig
from flowback.data.pixels import Faults, quantise, to_unit_range
from flowback.data.vae import Codec, open_codec
from flowback.errors import InputError
from flowback.files import check_outside, foreign_file, write_json
from flowback.folder_lock import folder_lock
from flowback.model import Flow, Student
from flowback.named_model import NamedModel
from flowback.progress import bar
from flowback.provenance import environment
from flowback.reading import read_json
from flowback.sampling import BlockPlan, Sampler
from flowback.sampling.block_plan import weights_hash
from flowback.sampling.denoise import denoises
from flowback.sampling.image_files import read_png, save_grid, save_npz, save_png, save_trajectory
from flowback.sampling.sampler import Overflow
from flowback.students.sampler import StudentSampler
from flowback.task_config import FolderConfig, SampleConfig

__all__ = [
    "Draw",
    "Drawn",
    "Failed",
    "OtherImagesError",
    "SampleFolder",
    "SampleReport",
    "class_ids",
    "draw_folder",
]

_SHOWN = 8
"""Images in the picture of the way from noise to image."""

_OWN_FILES = re.compile(r"\d{6,}\.png|[^/]+\.(npz|json)")
"""What a folder of samples may hold; ``--npz`` and ``--json`` may name a place beside the images."""


@dataclass(frozen=True)
class Failed:
    """An image that stayed non-finite, and was not written."""

    image: int
    """Its number."""
    overflow: Overflow | None
    """Where its last draw broke; None: in the decoder of latents, or it was finite when drawn again."""

    def to_dict(self) -> dict[str, int | None]:
        """Number, block and token, ready for JSON."""
        place = self.overflow or Overflow(None, None)
        return {"image": self.image, **asdict(place)}


@dataclass(frozen=True)
class SampleReport:
    """What :func:`draw_folder` did, in all processes."""

    out: Path
    drawn: int
    """Images drawn and written."""
    present: int
    """Images that were there before."""
    redrawn: int
    """Of those drawn, the ones that had non-finite values at first."""
    out_of_range: int
    """Of those drawn, the ones with values more than 0.5 outside [-1, 1]; their files hold the ends."""
    failed: tuple[Failed, ...]
    """Images that stayed non-finite; they were not written."""
    seconds: float
    settings: dict[str, Any]
    """All that decides how the images look."""
    notices: tuple[str, ...]
    """What a user should know, in sentences."""
    environment: dict[str, Any]

    @property
    def problem(self) -> str | None:
        """What is missing, in one sentence; None if nothing is."""
        if not self.failed:
            return None
        count, first = self.drawn + self.present + len(self.failed), self.failed[0]
        shown = ", ".join(str(failed.image) for failed in self.failed[:8])
        where = f" (image {first.image} first broke in {first.overflow})" if first.overflow else ""
        return (
            f"{len(self.failed)} of {count} images are missing in {self.out}, since they stayed non-finite: "
            f"{shown}{', ...' if len(self.failed) > 8 else ''}{where}; "
            "lower --guidance, use --precision fp32, or train the model further."
        )

    def to_dict(self) -> dict[str, Any]:
        """Environment, settings and result, ready for JSON."""
        result = {name: getattr(self, name) for name in ("drawn", "present", "redrawn", "out_of_range")}
        return {
            "environment": self.environment,
            "settings": self.settings,
            "result": {
                **result,
                "failed": [failed.to_dict() for failed in self.failed],
                "seconds": self.seconds,
                "images_per_second": self.drawn / self.seconds,
            },
            "notices": list(self.notices),
        }


def draw_folder(
    flow: Flow | Student,
    out: Path | str,
    config: FolderConfig | None = None,
    *,
    sampling: SampleConfig | None = None,
    plans: Sequence[BlockPlan] | None = None,
    codec: Codec | None = None,
    **options: Any,
) -> SampleReport:
    """Draw a folder of PNG images, or only the missing ones: what ``flowback sample`` does.

    Image i has seed ``config.seed`` + i, and the labels take turns. Nothing is written before everything is
    checked. Processes that a launcher started share the work, and all get the same report; the first one
    writes what concerns all images.

    Args:
        flow: the model, or a student of one.
        out: the folder. Images in it must have been drawn with the same settings and weights.
        config: what to draw.
        sampling: how.
        plans: how each block is inverted, from block 1; None is what ``sampling.sampler`` says, where
            ``auto`` is sequential: :func:`flowback.sampling.block_plan.resolve_plan` finds a stored plan.
        codec: decoder of latents; None is that of the flow's run.
        **options: fields of :class:`FolderConfig` and of :class:`flowback.SampleConfig` that replace theirs.

    Raises:
        InputError: options that do not fit the model or each other, or a folder of the training images.
        OtherImagesError: a folder with images drawn in another way; an :class:`InputError`, too.

    Example:
        >>> import flowback, tempfile
        >>> flow = flowback.create_flow("digits", num_classes=10, width=16, head_dim=8, layers=1, blocks=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = flowback.draw_folder(flow, folder, count=4, labels=[3, 7], guidance=1.0)
        >>> report.drawn, report.failed
        (4, ())
    """
    names = {field.name for field in fields(FolderConfig)}
    config = replace(config or FolderConfig(), **{k: v for k, v in options.items() if k in names})
    sampling = replace(sampling or SampleConfig(), **{k: v for k, v in options.items() if k not in names})
    every = range(flow.config.num_classes or 0)
    labels = [] if config.unconditional else class_ids(flow, config.labels or every)
    sampler = flow.sampler(sampling, plans)
    codec_config = (flow.run or RunConfig()).codec if codec is None else codec.config
    sampler.check(bool(labels), latent=codec_config.vae is not None)
    teacher = _teacher_sampler(flow, sampling) if config.compare else None
    if codec is None:
        codec = open_codec(codec_config, flow.device)
    job = _Job(flow, sampler, codec, labels, config, teacher)
    state = PartialState(cpu=flow.device.type == "cpu")
    settings = _settings(flow, sampler, sampling, codec, labels, config)
    folder = SampleFolder(Path(out), settings, config.count, sampling.batch_size)
    config.check_place(folder.path)
    photos = (flow.run or RunConfig()).data.folder
    if photos is not None:
        check_outside(folder.path, photos)
    state.wait_for_everyone()  # all have looked at the folder before the first one changes it
    with folder_lock(folder.path, state.is_main_process):
        if state.is_main_process:
            folder.begin()
        state.wait_for_everyone()
        missing = folder.missing()
        state.wait_for_everyone()
        started = time.perf_counter()
        parts = _draw_all(job, folder, missing, state)
        seconds = time.perf_counter() - started
        if state.is_main_process:
            _write_pictures(job, folder)
    notices = []
    if sampling.denoise and isinstance(sampler, Sampler) and not denoises(sampler.flow):
        notices.append("Not denoised: this model was trained without Gaussian noise.")
    faults = functools.reduce(Faults.merge, (part.faults for part in parts), Faults())
    notices += faults.sentences()
    return SampleReport(
        folder.path,
        drawn=sum(part.images for part in parts),
        present=config.count - len(missing),
        redrawn=sum(part.redrawn for part in parts),
        out_of_range=faults.out_of_range,
        failed=tuple(sorted((failed for part in parts for failed in part.failed), key=lambda f: f.image)),
        seconds=seconds,
        settings={**folder.settings, "count": config.count},
        notices=tuple(notices),
        environment=environment(flow.device),
    )


def _draw_all(job: _Job, folder: SampleFolder, missing: Sequence[int], state: PartialState) -> list[Drawn]:
    """Draw this process's share of the missing images; what all processes did."""
    done = []
    with bar() as progress:
        task = progress.add_task("sampling", total=-(-len(missing) // state.num_processes), note="")
        for part in folder.fill(job, missing, state.process_index, state.num_processes, job.config.redraws):
            done.append(part)
            progress.advance(task, part.images + len(part.failed))
    return gather_object(done) if state.num_processes > 1 else done


def _teacher_sampler(model: Flow | Student, sampling: SampleConfig) -> Sampler:
    """What draws the teacher's own images, exactly."""
    if not isinstance(model, Student):
        raise InputError(
            "--compare shows a student beside its teacher, and this model is a flow; leave it out."
        )
    return model.teacher_sampler(sampling)


def class_ids(flow: NamedModel, labels: Sequence[str | int]) -> list[int]:
    """Ids of classes given by name or id, as on the command line.

    A text is a name where a class has it, and else an id: of the classes 1, 2 and 10, ``"10"`` is that name,
    and ``10`` the id.

    Raises:
        InputError: an unknown name, or an id out of range.
    """
    names_or_ids: list[Any] = [
        int(label) if isinstance(label, str) and label not in flow.classes and label.isdecimal() else label
        for label in labels
    ]
    ids = flow.labels(names_or_ids, len(names_or_ids)) if names_or_ids else None
    return [] if ids is None else ids.tolist()


def _settings(
    flow: Flow | Student,
    sampler: Sampler | StudentSampler,
    sampling: SampleConfig,
    codec: Codec,
    labels: Sequence[int],
    config: FolderConfig,
) -> dict[str, Any]:
    """All that decides how an image looks."""
    keep = ("guidance", "ramp", "formula", "attention_temperature", "guided_blocks", "denoise", "precision")
    swept = any(plan.window > 1 for plan in sampler.plans)
    return {
        "weights": weights_hash(flow),
        "labels": list(labels),
        "seed": config.seed,
        **{name: getattr(sampling, name) for name in keep},
        "plans": [asdict(plan) for plan in sampler.plans] if swept else None,
        **(_student_settings(flow) if isinstance(flow, Student) else {}),
        **_sampler_settings(sampler),
        **({"vae": codec.config.weights} if codec.config.vae else {}),
    }


def _student_settings(student: Student) -> dict[str, Any]:
    return {"student": student.student.method, "teacher_weights": student.student.teacher_weights}


def _sampler_settings(sampler: Sampler | StudentSampler) -> dict[str, Any]:
    """What only a flow's sampler has, or a student's."""
    if isinstance(sampler, StudentSampler):
        return {"evaluations": sampler.evaluations, "solver": sampler.solver}
    level = {} if sampler.noise is None else {"noise": sampler.noise}
    return {"denoising": _denoising(sampler), **level}


def _denoising(sampler: Sampler) -> dict[str, Any] | None:
    """What decides how images are denoised; None for none, or one step without options."""
    how = {name: getattr(sampler.denoising, name) for name in ("method", "clamp", "guidance")}
    if len(sampler.levels) > 1:
        return {"levels": sampler.levels, **how}
    return how if sampler.levels and (how["clamp"] or how["guidance"]) else None


class OtherImagesError(InputError):
    """A folder holds images that were drawn with other settings or weights."""


class Draw(Protocol):
    """How the images of a folder are made."""

    def __call__(self, numbers: list[int], redraw: int) -> Tensor:
        """Images (B, C, H, W) of these numbers; ``redraw`` is 0 at first."""
        ...

    def notes(self, number: int) -> dict[str, object]:
        """Text stored in an image's file."""
        ...

    def overflows(self, numbers: list[int], redraw: int) -> list[Overflow | None]:
        """Where images that are not finite broke."""
        ...


@dataclass(frozen=True)
class _Job:
    """The images of :func:`draw_folder`, by number."""

    flow: Flow | Student
    sampler: Sampler | StudentSampler
    codec: Codec
    ids: list[int]
    """Classes in turn; empty for unconditional."""
    config: FolderConfig
    teacher: Sampler | None = None
    """Draws the teacher's images, if they are to be compared with."""

    def labels(self, numbers: Sequence[int]) -> list[int] | None:
        """Class ids of the images, or None."""
        return [self.ids[number % len(self.ids)] for number in numbers] if self.ids else None

    def class_name(self, number: int) -> str:
        """Name of an image's class; its id where the model does not know the names."""
        class_id = self.ids[number % len(self.ids)]
        return self.flow.classes[class_id] if self.flow.classes else str(class_id)

    def seeds(self, numbers: Sequence[int]) -> list[int]:
        """Seeds of the images."""
        return [self.config.seed + number for number in numbers]

    def __call__(self, numbers: list[int], redraw: int) -> Tensor:
        return self.codec.decode(self.sampler(self.labels(numbers), self.seeds(numbers), redraw))

    def notes(self, number: int) -> dict[str, object]:
        """Seed and label."""
        labels = self.labels([number])
        return {"seed": self.config.seed + number, **({"label": labels[0]} if labels else {})}

    def overflows(self, numbers: list[int], redraw: int) -> list[Overflow | None]:
        """Where images that are not finite broke."""
        return self.sampler.overflows(self.labels(numbers), self.seeds(numbers), redraw)


@dataclass(frozen=True)
class Drawn:
    """What one process did for one batch."""

    images: int
    """Images written."""
    redrawn: int
    """Of these, the ones that had non-finite values at first and were drawn again."""
    failed: tuple[Failed, ...]
    """Images that stayed non-finite; they were not written."""
    faults: Faults
    """Of the images written, those with values far outside [-1, 1]."""


class SampleFolder:
    """The images 0 ... count − 1 of one setting as ``000000.png`` and so on.

    Args:
        path: the folder.
        settings: all that decides how the images look; stored as ``sampling.json``.
        count: number of images.
        batch_size: images drawn at once.

    Raises:
        InputError: the folder holds something else; :class:`OtherImagesError`: images of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], count: int, batch_size: int) -> None:
        self.path, self.count, self.batch_size = path, count, batch_size
        self.settings = json.loads(json.dumps({**settings, "batch_size": batch_size}, default=str))
        self._check()

    def _check(self) -> None:
        note = self.path / "sampling.json"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose a folder with --out.")
        if note.is_file():
            try:
                stored = read_json(note)
            except ValueError:
                raise InputError(f"{note} is damaged; choose another --out, or empty the folder.") from None
            for key in sorted({*stored, *self.settings}):
                if stored.get(key) != self.settings.get(key):
                    was, now = stored.get(key), self.settings.get(key)
                    raise OtherImagesError(
                        f"{self.path} holds images drawn with {key} = {was}, not {now}; "
                        "choose another --out, or continue with the same settings."
                    )
        begun = note.is_file()
        other = foreign_file(self.path, lambda name: begun and _OWN_FILES.fullmatch(name) is not None)
        if other is not None:
            raise InputError(
                f"{self.path} holds something else ({other}); choose an empty folder with --out, or move "
                "it away."
            )

    def file(self, index: int) -> Path:
        """Path of an image."""
        return self.path / f"{index:06d}.png"

    def begin(self) -> None:
        """Make the folder, note the settings, and remove what a killed run left half-written.

        Raises:
            InputError: since this object was made, another process wrote something else into the folder.
        """
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "sampling.json", self.settings)
        for leftover in self.path.glob(".*.png.*"):
            leftover.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Numbers of the images not there yet."""
        return [index for index in range(self.count) if not self.file(index).is_file()]

    def fill(
        self, draw: Draw, missing: Sequence[int], rank: int = 0, world: int = 1, redraws: int = 3
    ) -> Iterator[Drawn]:
        """Draw this process's share of the ``missing`` images; yields after each batch.

        Args:
            draw: makes the images.
            missing: from :meth:`missing`, before any process began: all must share out the same batches.
            rank: number of this process.
            world: number of processes.
            redraws: how often an image with non-finite values is drawn again.
        """
        wanted = set(missing)
        batches = sorted({index // self.batch_size for index in wanted})
        for batch in batches[rank::world]:
            first = batch * self.batch_size
            numbers = list(range(first, min(first + self.batch_size, self.count)))
            images, attempts = _finite_draw(draw, numbers, redraws)
            finite = images.flatten(1).isfinite().all(1).tolist()
            written = [row for row, number in enumerate(numbers) if finite[row] and number in wanted]
            faults = Faults()
            names = [f"image {numbers[row]}" for row in written]
            pictures = quantise(images[written], names, faults).cpu()
            for row, pixels in zip(written, pictures, strict=True):
                text = {**draw.notes(numbers[row]), **({"redraw": attempts[row]} if attempts[row] else {})}
                save_png(pixels, self.file(numbers[row]), text)
            at_first = [attempts[row] == 0 and finite[row] for row in range(len(numbers))]
            broken = [n for n, good in zip(numbers, at_first, strict=True) if n in wanted and not good]
            if broken:
                faults.stages.update(place.stage for place in draw.overflows(broken, 0) if place)
            bad = [number for row, number in enumerate(numbers) if not finite[row] and number in wanted]
            places = draw.overflows(bad, redraws) if bad else []
            yield Drawn(
                len(written),
                sum(attempts[row] > 0 for row in written),
                tuple(Failed(number, place) for number, place in zip(bad, places, strict=True)),
                faults,
            )


def _finite_draw(draw: Draw, numbers: list[int], redraws: int) -> tuple[Float[Tensor, "b c h w"], list[int]]:
    """Images of these numbers, and which redraw each one is."""
    images, attempts = draw(numbers, 0), [0] * len(numbers)
    for attempt in range(1, redraws + 1):
        bad = torch.nonzero(~images.flatten(1).isfinite().all(1)).flatten().tolist()
        if not bad:
            break
        images = images.clone()
        images[bad] = draw([numbers[row] for row in bad], attempt)
        for row in bad:
            attempts[row] = attempt
    return images, attempts


def _write_pictures(job: _Job, folder: SampleFolder) -> None:
    """The grid, the .npz and the trajectory, of the images that are there."""
    config = job.config
    there = [number for number in range(config.count) if folder.file(number).is_file()]
    if (config.grid or config.npz) and there:
        pixels = {number: read_png(folder.file(number))[0] for number in there}
        if config.grid:
            rows = _grid_rows(there, len(job.ids))
            black, columns = torch.zeros_like(pixels[there[0]]), len(rows[0])
            shown = torch.stack([pixels.get(number, black) for row in rows for number in row])
            names = [job.class_name(row[0]) for row in rows] if job.ids else []
            save_grid(to_unit_range(shown), config.grid, columns, names=names)
        if config.npz:
            save_npz(torch.stack([pixels[number] for number in there]), config.npz, job.labels(there))
    if config.compare and job.teacher is not None:
        numbers = range(min(_SHOWN, config.count))
        labels, seeds = job.labels(numbers), job.seeds(numbers)
        exact, own = (job.codec.decode(draw(labels, seeds)) for draw in (job.teacher, job.sampler))
        compared = torch.cat([exact, own, (own - exact) / 2])
        save_grid(compared, config.compare, len(numbers), names=["teacher", "student", "difference"])
    if config.trajectory:
        numbers = range(min(_SHOWN, config.count))
        states = job.sampler.trajectory(job.labels(numbers), job.seeds(numbers))
        save_trajectory([job.codec.decode(state) for state in states], config.trajectory)


def _grid_rows(there: Sequence[int], classes: int) -> list[list[int]]:
    """Numbers of the images, row by row, all rows equally long.

    Each class that was drawn has a row; where it has fewer images than another, numbers without an image
    fill it up.
    """
    if not classes:
        columns = max(1, round(len(there) ** 0.5))
        return [list(there[first : first + columns]) for first in range(0, len(there), columns)]
    columns = max(there) // classes + 1
    rows = [list(range(first, columns * classes, classes)) for first in range(classes)]
    return [row for row in rows if not set(there).isdisjoint(row)]
