"""The one training loop. Running it again on the same folder goes on where it stopped, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowback import checkpoint
from flowback.alignment.diagnostics import gradient_balance
from flowback.config import RunConfig, to_dict
from flowback.data.images import ImageSet
from flowback.errors import InputError
from flowback.flow import Flow
from flowback.progress import bar
from flowback.record import environment, replacing, write_json
from flowback.training.health import Guard, block_statistics
from flowback.training.objective import Losses, Objective, Targets
from flowback.training.schedule import average_decay, learning_rate, update_average
from flowback.training.stream import Batch, batches

__all__ = ["BadGradientError", "Evaluator", "Interrupted", "train"]

log = logging.getLogger("flowback")

MAY_CHANGE = {
    "train": {"steps", "micro_batch", "device", "log_every", "eval_every", "save_every", "sample_every"}
    | {"diagnose_every", "eval_images", "keep_last", "keep_every", "tensorboard"},
    "data": {"path", "workers", "download", "bad_images"},
    "alignment": {"weights"},
}
"""Options that a resumed run may change; all others would make it another run."""


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """The run was asked to stop by SIGINT or SIGTERM; its state is saved."""


class BadGradientError(InputError):
    """Too many steps had a gradient that is not finite, or that spikes."""


@dataclass(frozen=True)
class Evaluator:
    """Something to look at while training: called with the step and the averaged flow, in eval mode.

    What it returns goes into metrics.jsonl.
    """

    every: int
    """Steps between calls; the last step is always one."""
    call: Callable[[int, Flow], dict[str, float]]


def train(
    config: RunConfig,
    images: ImageSet,
    out: Path,
    targets: Targets | None = None,
    evaluators: Sequence[Evaluator] = (),
    description: str = "train",
) -> dict[str, Any]:
    """Train a flow until ``config.train.steps``; resumes what stands in ``out``.

    Args:
        config: all settings, with the number of classes known.
        images: the training images.
        out: the run's folder: config.json, environment.json, metrics.jsonl, checkpoints/.
        targets: gives the encoder's features of a batch; needed when alignment is active.
        evaluators: called at their intervals with the averaged flow.
        description: shown beside the progress bar.

    Returns:
        The last row of metrics: ``step``, ``images``, ``nll``, ``seconds`` of training alone, ...

    Raises:
        InputError: the folder holds another run, or options changed that must not.
        BadGradientError: gradients are not finite; the last good checkpoint stands.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    run = _Run(config, images, Path(out), targets)
    with _signals() as asked, bar("images") as progress:
        task = progress.add_task(description, total=config.train.steps * config.train.batch_size, note="")
        progress.update(task, completed=run.step * config.train.batch_size)
        originals = targets.originals if targets is not None else None
        stream = batches(images, config, run.step, run.rank, run.processes, run.device, originals)
        started = time.perf_counter()
        for batch in stream:
            losses, gradient = run.update(batch)
            progress.advance(task, config.train.batch_size)
            row: dict[str, Any] = {}
            if run.due(config.train.log_every):
                run.seconds += time.perf_counter() - started
                row = run.measure(batch, losses, gradient)
                progress.update(task, note=f"nll {row['nll']:.4f}")
                started = time.perf_counter()
            run.seconds += time.perf_counter() - started  # evaluation and saving are not training
            for evaluator in evaluators:
                if run.due(evaluator.every):
                    row |= run.evaluate(evaluator)
            if config.alignment.active and run.due(config.train.diagnose_every):
                row |= run.diagnose(batch)
            run.write(row)
            stop = run.agree(bool(asked))
            if stop or run.due(config.train.save_every):
                run.save()
            if stop:
                raise Interrupted(
                    f"Stopped by signal {asked[0]}" if asked else "Stopped by a signal to another process"
                )
            started = time.perf_counter()
    run.finish()
    return run.last


class _Run:
    """State of a run: weights, their average, optimiser, position."""

    def __init__(self, config: RunConfig, images: ImageSet, out: Path, targets: Targets | None) -> None:
        self.config, self.images, self.out, self.targets = config, images, out, targets
        self.accelerator = Accelerator(cpu=config.train.device == "cpu")
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        _check(config, images, targets, self.processes)
        torch.manual_seed(config.train.seed)
        self.objective = Objective(config, targets.dim if targets and config.alignment.active else None)
        average = copy.deepcopy(self.objective.flow).eval().requires_grad_(False)
        self.averages = {decay: copy.deepcopy(average).to(self.device) for decay in config.train.averages}
        self.average = self.averages[config.train.ema_decay]
        self.guard, self.known_bad = Guard(config.train.spike, self.device), 0
        self.step, self.seconds = 0, 0.0
        self.last: dict[str, Any] = {}
        self.shown = (0, 0.0)  # step and seconds at the last row, for the rate
        self.adamw = torch.optim.AdamW(
            self.objective.parameters(),
            lr=config.train.lr,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        model, self.optimizer = self.accelerator.prepare(self.objective, self.adamw)
        self.model: nn.Module = model
        state = self._resume()
        if state is None:
            self._begin()
        else:
            self._restore(state)
        self.board = _board(out, self.step) if config.train.tensorboard and self.rank == 0 else None

    # --- starting and resuming ---

    def _begin(self) -> None:
        if not self.accelerator.is_main_process:
            return
        written = self.out / "config.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if written.exists():  # stopped before its first checkpoint: start over
                _compare(checkpoint.read_config(self.out), self.config, self.out)
            elif (self.out / "metrics.jsonl").exists():
                raise InputError(f"{self.out} holds metrics of something else; choose another --out.")
            write_json(written, {"format": checkpoint.FORMAT, **to_dict(self.config)})
            write_json(self.out / "environment.json", environment(self.device))
            with replacing(self.out / "README.md") as file:
                file.write(_readme(self.config))
            _truncate(self.out / "metrics.jsonl", 0)
        except OSError as error:
            raise InputError(
                f"--out {self.out} cannot be written: {error.strerror}; choose another folder."
            ) from None

    def _resume(self) -> dict[str, Any] | None:
        """The newest usable training state in the run's folder."""
        for partial in (self.out / "checkpoints").glob(".step-*"):  # a save that a kill cut short
            shutil.rmtree(partial, ignore_errors=True)
        folders = checkpoint.step_folders(self.out)
        for folder in reversed(folders):
            try:
                stored, state = checkpoint.load_config(folder), checkpoint.load_training_state(folder)
            except InputError as error:
                log.warning("%s Going back to the checkpoint before it.", error)
                continue
            _compare(stored, self.config, self.out)
            for decay, average in self.averages.items():
                average.load_state_dict(checkpoint.load(folder, ema=decay).state_dict())
            return state
        if folders:
            raise InputError(
                f"No checkpoint in {self.out} is usable; remove {self.out / 'checkpoints'} to start again."
            )
        return None

    def _restore(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self.known_bad = int(self.guard.bad)
        self.step, self.seconds = state["step"], state["seconds"]
        self.shown = (self.step, self.seconds)
        if self.accelerator.is_main_process:
            self.last = _truncate(self.out / "metrics.jsonl", self.step)

    # --- one step ---

    def update(self, batch: Batch) -> tuple[Losses, Tensor]:
        """One optimiser step; returns the losses of the last micro-batch and the gradient norm."""
        train = self.config.train
        share = len(batch.noised)
        micro = train.micro_batch or share
        starts = range(0, share, micro)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, self.step)
        for start in starts:
            part = slice(start, start + micro)
            last = start + micro >= share
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self.model(
                    batch.noised[part],
                    None if batch.labels is None else batch.labels[part],
                    None if batch.drop is None else batch.drop[part],
                    None
                    if self.targets is None
                    else self.targets(batch.indices[part], batch.flipped[part], batch.seen[part]),
                )
                weight = len(batch.noised[part]) / share
                (losses.total * weight).backward()
        gradient = nn.utils.clip_grad_norm_(self.objective.parameters(), train.grad_clip or float("inf"))
        # The fused optimiser leaves a step out where found_inf is 1, on the device.
        self.adamw.found_inf = self.guard.judge(gradient, self.step + 1)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for decay, average in self.averages.items():
            update_average(
                average.parameters(), self.objective.flow.parameters(), average_decay(decay, self.step)
            )
        self.step += 1
        # Reading the tally waits for the device: every step on a CPU, elsewhere when somebody looks anyway.
        train = self.config.train
        if self.device.type == "cpu" or self.due(train.log_every) or self.due(train.save_every):
            self._check_health()
        return losses, gradient

    def _check_health(self) -> None:
        """Count and record bad steps; stop when there are too many."""
        bad = int(self.guard.bad)
        if bad == self.known_bad:
            return
        self.known_bad, step, allowed = bad, int(self.guard.last), self.config.train.bad_steps
        if self.accelerator.is_main_process:
            self._keep_evidence(step)
        if allowed is not None and bad > allowed:
            raise BadGradientError(
                f"Step {step}: the gradient is not finite or spikes, and {allowed} such steps may pass; "
                f"training stopped (see {self.out}/bad-steps.jsonl) and the last good checkpoint stands. "
                "Lower --train.lr, set --train.grad-clip 1, or leave such steps out with --train.bad-steps."
            )
        log.warning("Step %d was left out: its gradient is not finite or spikes (%d so far).", step, bad)

    def _keep_evidence(self, step: int) -> None:
        """The images of a bad step, which the seed gives back, and what the blocks make of them now."""
        batch = next(batches(self.images, self.config, step - 1, 0, 1, self.device))
        row = {
            "step": step,
            "images": [self.images.file_name(index) for index in batch.indices.tolist()],
            "typical_grad_norm": float(self.guard.typical),
            **block_statistics(self.objective.flow, batch.noised, batch.labels),
        }
        with (self.out / "bad-steps.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def due(self, every: int) -> bool:
        """Whether something that happens ``every`` so many steps, and at the end, happens now."""
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def agree(self, flag: bool) -> bool:
        """Whether any process raised ``flag``; with several processes, asked every tenth step."""
        if self.processes == 1:
            return flag
        if self.step % 10:
            return False
        votes = self.accelerator.reduce(torch.tensor(float(flag), device=self.device))
        return bool(votes > 0)

    # --- looking and keeping ---

    def measure(self, batch: Batch, losses: Losses, gradient: Tensor) -> dict[str, Any]:
        """A row of metrics about the last step."""
        config, images = self.config, self.step * self.config.train.batch_size
        steps, seconds = self.step - self.shown[0], self.seconds - self.shown[1]
        self.shown = (self.step, self.seconds)
        row = {
            "step": self.step,
            "images": images,
            "nll": self._mean(losses.nll),
            "lr": learning_rate(config.train, self.step - 1),
            "grad_norm": float(gradient),
            "images_per_second": steps * config.train.batch_size / seconds if seconds else 0.0,
            "seconds": self.seconds,
        }
        row |= {
            "bad_steps": self.known_bad,
            **block_statistics(self.objective.flow, batch.noised, batch.labels),
        }
        if losses.alignment is not None:
            row["alignment"] = self._mean(losses.alignment)
            row |= {f"cosine_{t}_{layer}": self._mean(value) for (t, layer), value in losses.cosine.items()}
        return row

    def _mean(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value.float(), "mean"))

    def evaluate(self, evaluator: Evaluator) -> dict[str, Any]:
        """Call an evaluator on the main process."""
        found: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            found = {"step": self.step, "images": self.step * self.config.train.batch_size}
            found |= evaluator.call(self.step, self.average)
        self.accelerator.wait_for_everyone()
        return found

    def diagnose(self, batch: Batch) -> dict[str, Any]:
        """How the gradients of likelihood and alignment compare on this process's share of the batch."""
        objective, config = self.objective, self.config.alignment
        assert objective.projector is not None
        assert self.targets is not None
        targets = self.targets(batch.indices, batch.flipped, batch.seen)
        return {"step": self.step, "images": self.step * self.config.train.batch_size} | gradient_balance(
            objective.flow, objective.projector, batch.noised, batch.labels, batch.drop, targets, config
        )

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if not row or not self.accelerator.is_main_process:
            return
        self.last = row
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, self.step)

    def save(self) -> None:
        """Write a checkpoint and remove those that are too old."""
        if self.accelerator.is_main_process:
            state = {
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "guard": self.guard.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            }
            folder = self.out / "checkpoints" / f"step-{self.step:08d}"
            weights, *more = (average.state_dict() for average in self.averages.values())
            further = dict(zip(self.config.train.ema_more, more, strict=True))
            checkpoint.save(folder, self.config, weights, state, further)
            self._remove_old()
        self.accelerator.wait_for_everyone()

    def _remove_old(self) -> None:
        train = self.config.train
        for folder in checkpoint.step_folders(self.out)[: -train.keep_last]:
            step = int(folder.name.removeprefix("step-"))
            if not train.keep_every or step % train.keep_every:
                shutil.rmtree(folder)

    def finish(self) -> None:
        """Leave nothing behind that a second run in this process would trip over."""
        if self.board is not None:
            self.board.close()
        self.accelerator.free_memory()
        self.accelerator.end_training()


def _board(out: Path, step: int) -> Any:
    """TensorBoard's writer; what a stopped run wrote after ``step`` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--train.tensorboard needs the package: pip install flowback-nf[tensorboard]."
        ) from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def _check(config: RunConfig, images: ImageSet, targets: Targets | None, processes: int) -> None:
    classes, found = config.model.num_classes, len(images.classes)
    if classes is None or classes not in (0, found):
        raise InputError(
            f"--model.num-classes is {classes}, but {images.name} has {found} classes; "
            f"leave the option out, or set it to {found} (0: unconditional)."
        )
    if config.train.batch_size % processes:
        raise InputError(
            f"--train.batch-size {config.train.batch_size} is not divisible by {processes} processes; "
            "choose a multiple."
        )
    if config.alignment.active and targets is None:
        raise InputError("Alignment is active, but no encoder features were given; pass targets.")


def _compare(stored: RunConfig, config: RunConfig, out: Path) -> None:
    """Refuse to resume where an option changed that makes it another run."""
    changed = []
    for section in ("model", "data", "alignment", "train"):
        before, now = getattr(stored, section), getattr(config, section)
        for field in dataclasses.fields(before):
            old, new = getattr(before, field.name), getattr(now, field.name)
            if old != new and field.name not in MAY_CHANGE.get(section, set()):
                changed.append(f"--{section}.{field.name.replace('_', '-')} (was {old}, now {new})")
    if changed:
        raise InputError(
            f"{out} holds a run with other settings: {', '.join(changed)}; "
            "choose another --out, or the settings of that run."
        )


def _truncate(file: Path, step: int) -> dict[str, Any]:
    """Drop the rows of metrics after ``step``, which will be written again; returns the last one kept."""
    rows = []
    if file.exists():
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= step]
    with replacing(file) as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return rows[-1] if rows else {}


def _readme(config: RunConfig) -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return (
        f"# A run of flowback\n\nStarted with `{command}`; the same command goes on where it stopped.\n\n"
        f"- `config.json`: every setting; `environment.json`: versions, commit, device\n"
        f"- `metrics.jsonl`: a row every {config.train.log_every} steps, nll in nats per dimension\n"
        f"- `checkpoints/`: use with `flowback sample`, `flowback classify` or `flowback.load`\n"
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step."""
    asked: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread: leave signals to whoever runs us
            previous[number] = signal.signal(number, lambda received, _: asked.append(received))
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
