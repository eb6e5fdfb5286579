"""One process's part of a run: it makes steps, looks at them, and keeps the run's folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from torch import Tensor

from flowback import checkpoint
from flowback.alignment.align import Losses, Noised, weight_at
from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.errors import InputError
from flowback.training.batches import Batch, batches
from flowback.training.distillation import StudentLosses
from flowback.training.distributed import Vote, gathered, root_whole, sharded, start
from flowback.training.evaluators import Evaluator
from flowback.training.monitoring import (
    Guard,
    check_trackers,
    gradient_balance,
    open_trackers,
    peak_flops,
    peak_memory,
    show,
    sums_by_level,
    tracker_settings,
    vanished,
)
from flowback.training.objective import Objective, Targets, weighted_mean
from flowback.training.run_folder import RunFolder, Stored, Writer
from flowback.training.state import Weights, learning_rate

__all__ = ["BadGradientError", "Trainer"]

log = logging.getLogger("flowback")


class BadGradientError(InputError):
    """Too many steps had a gradient that is not finite, is exactly 0, or spikes."""


class Trainer:
    """State of a run: weights, position, and the last figures.

    All processes of the run call every method at the same steps.

    Args:
        config: all settings, with the number of classes known.
        images: the training images.
        out: the run's folder; a run that is there continues.
        targets: gives the encoder's features of a batch; needed when alignment is active.

    Raises:
        InputError: the folder holds another run, or options changed that must not.
    """

    def __init__(self, config: RunConfig, images: ImageSet, out: Path, targets: Targets | None) -> None:
        self.config, self.images, self.targets = config, images, targets
        check_trackers(config)
        state = start(config.train)
        with patch_environment(ACCELERATE_USE_FSDP="false"):  # else Accelerate shards by its own rules
            self.accelerator = Accelerator(
                cpu=state.device.type == "cpu", mixed_precision="no", **tracker_settings(config, out)
            )
        self.rank, self.processes = state.process_index, state.num_processes
        self.device = state.device
        self.vote = Vote(state, config.train.timeout)
        self.writer = Writer()
        self.folder = RunFolder(out, config)
        stored = self.folder.newest()
        self.weights = Weights(
            config,
            targets.dim if targets and config.alignment.active else None,
            self.accelerator,
            sharded(config.train, self.processes),
            None if stored else config.train.init_from,
        )
        self.guard, self.known_bad = Guard(config.train.spike, self.device), 0
        self.step, self.seconds = 0, 0.0
        self.last: dict[str, Any] = {}
        self.warned: set[str] = set()
        self.stopped = False
        """Whether the gradients' cosine has ended the alignment."""
        if stored:
            self._restore(stored)
        self.accelerator.wait_for_everyone()  # all have read the folder before the main process changes it
        if self.rank == 0:
            self.folder.sweep()
            if stored:
                self.last = self.folder.goes_on(self.step, self.device, self.processes)
            else:
                self.folder.begin(self.device, self.processes)
            if config.train.trackers:
                open_trackers(self.accelerator, config, out, self.folder.identity, self.step)
        self.shown = (self.step, self.seconds)  # at the last row, for the rate

    def _restore(self, stored: Stored) -> None:
        state = stored.training
        kinds = {"objective": dict, "optimizer": dict, "guard": dict, "step": int, "seconds": float}
        for part, kind in kinds.items():
            if not isinstance(state.get(part), kind):
                raise InputError(f"{stored.folder / 'training.pt'} holds no {part}; remove {stored.folder}.")
        try:
            self.weights.restore(state, stored.averages)
        except InputError as error:
            raise InputError(f"The checkpoint {stored.folder} does not fit this run: {error}") from None
        self.guard.load_state_dict(state["guard"])
        self.known_bad = int(self.guard.bad)
        self.step, self.seconds = state["step"], state["seconds"]
        self.stopped = state.get("alignment_stopped", False)

    # --- one step ---

    @property
    def alignment_weight(self) -> float:
        """Weight of the alignment loss at the next step; 0 once it has stopped."""
        return 0.0 if self.stopped else weight_at(self.config.alignment, self.step)

    def update(self, batch: Batch) -> tuple[Losses | StudentLosses, Tensor]:
        """One optimiser step; returns the losses of this process's share and the gradient norm."""
        train = self.config.train
        share, alignment = len(batch.noised), self.alignment_weight
        micro = train.micro_batch or share
        starts = range(0, share, micro)
        parts: list[tuple[float, Any]] = []
        for first in starts:
            part = slice(first, first + micro)
            last = first + micro >= share
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.weights.model):
                losses = self.weights.model(*self._inputs(batch, part, alignment))
                weight = len(batch.noised[part]) / share
                (losses.loss * weight).backward()
            parts.append((weight, losses))
        gradient = self.weights.gradient_norm()
        self.weights.step(self.step, bad=self.guard.judge(gradient, self.step + 1))
        self.step += 1
        # Reading the tally waits for the device: every step on a CPU, elsewhere when somebody looks anyway.
        if self.device.type == "cpu" or self.due(train.log_every) or self.due(train.save_every):
            self._check_health()
        return weighted_mean(parts), gradient

    def _inputs(self, batch: Batch, part: slice, alignment: float) -> tuple[Any, ...]:
        """What the objective takes of a part of the batch."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[part]

        images = (batch.noised[part], cut(batch.labels), cut(batch.drop))
        if self.config.student.active:
            return (*images, batch.clean[part], cut(batch.chance), cut(batch.noise))
        over = self.config.alignment.active and not alignment
        targets = None
        if self.targets is not None and not over:
            targets = self.targets(batch.indices[part], batch.flipped[part], batch.seen[part])
        return (*images, targets, alignment, cut(batch.levels), cut(batch.alignment_weights))

    def _check_health(self) -> None:
        """Count and record bad steps; stop when there are too many."""
        bad = int(self.guard.bad)
        if bad == self.known_bad:
            return
        self.known_bad, step, allowed = bad, int(self.guard.last), self.config.train.bad_steps
        self._keep_evidence(step)
        reason = self.guard.reason()
        if allowed is not None and bad > allowed:
            raise BadGradientError(
                f"Step {step}: the gradient {reason}, and {allowed} bad steps are allowed; training stopped "
                f"(see {self.folder.path}/bad-steps.jsonl), its last checkpoint remains. Lower --train.lr, "
                "set --train.grad-clip 1, or skip such steps with --train.bad-steps."
            )
        log.warning("Step %d was skipped: its gradient %s (%d bad steps so far).", step, reason, bad)

    def _keep_evidence(self, step: int) -> None:
        """Record the images of a bad step, known from the seed, and the blocks' statistics on them now."""
        batch = next(batches(self.images, self.config, step - 1, 0, 1, self.device))
        statistics = self._own_statistics(batch)
        row = {
            "step": step,
            "images": [self.images.file_name(index) for index in batch.indices.tolist()],
            "grad_norm": float(self.guard.norm),
            "typical_grad_norm": float(self.guard.typical),
            **statistics,
        }
        if self.rank == 0:
            self.folder.append("bad-steps.jsonl", row)

    def due(self, every: int) -> bool:
        """Whether something that is due every ``every`` steps, and at the end, is due now."""
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    # --- looking ---

    def look(
        self, batch: Batch, losses: Losses | StudentLosses, gradient: Tensor, evaluators: Sequence[Evaluator]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that is due after the last step: a row of metrics (empty if nothing is), and pictures."""
        row: dict[str, Any] = {}
        if self.due(self.config.train.log_every):
            row |= self._measure(batch, losses, gradient)
        for evaluator in evaluators:
            if self.due(evaluator.every):
                row |= self._evaluate(evaluator)
        if self.alignment_weight and self.due(self.config.train.diagnose_every):
            row |= self._diagnose(batch)
        pictures = {name: row.pop(name) for name in list(row) if isinstance(row[name], Tensor)}
        if row:
            row = {"step": self.step, "images": self.step * self.config.train.batch_size} | row
        for sentence in vanished(row):
            if self.rank == 0 and sentence not in self.warned:
                log.warning("Step %d: %s", self.step, sentence)
            self.warned.add(sentence)
        return row, pictures

    def _measure(self, batch: Batch, losses: Losses | StudentLosses, gradient: Tensor) -> dict[str, Any]:
        """Figures of the last step."""
        train = self.config.train
        steps, seconds = self.step - self.shown[0], self.seconds - self.shown[1]
        self.shown = (self.step, self.seconds)
        rate = steps / seconds if seconds else 0.0
        figures, aligned = losses.figures, batch.alignment_weights
        if aligned is not None and not self._mean(aligned.mean()):
            figures = {"nll": figures["nll"]}  # the step had no image of an aligned level
        row = {
            **{name: self._mean(value) for name, value in figures.items()},
            "lr": learning_rate(train, self.step - 1),
            "grad_norm": float(gradient),
            "images_per_second": rate * train.batch_size,
            "tflops": rate * self.weights.objective.step_flops / 1e12,
            "peak_memory": peak_memory(self.device),
            "state_memory": self.weights.held_bytes,
            "seconds": self.seconds,
            "bad_steps": self.known_bad,
            **self._block_statistics(batch),
        }
        if self.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self.device), train.precision)
            if peak is not None:
                row["mfu"] = row["tflops"] * 1e12 / (peak * self.processes)
        if self.config.alignment.active:
            row["alignment_weight"] = self.alignment_weight
        if batch.levels is not None and isinstance(losses, Losses):
            row |= self._by_level(batch.levels, losses)
        return row

    def _by_level(self, levels: Tensor, losses: Losses) -> dict[str, float]:
        """Means of the last step over its images of low, middle and high noise; none of no image."""
        images = {"nll": losses.image_nll}
        if losses.image_cosine is not None:
            images["cosine"] = losses.image_cosine
        sums = self.accelerator.reduce(sums_by_level(levels, list(images.values()), self.config), "sum")
        return {
            f"{name}_level_{part}": total / count
            for part, (count, *totals) in enumerate(sums.tolist(), start=1)
            for name, total in zip(images, totals, strict=True)
            if count
        }

    def _mean(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value.float(), "mean"))

    def _own_statistics(self, batch: Batch) -> dict[str, float]:
        with root_whole(self.weights.objective):
            return self.weights.objective.statistics(
                Noised(batch.noised, batch.labels, batch.drop, batch.levels)
            )

    def _block_statistics(self, batch: Batch) -> dict[str, float]:
        """Those of the whole batch."""
        statistics = self._own_statistics(batch)
        values = torch.tensor([list(statistics.values())], device=self.device)
        rows = self.accelerator.gather(values).cpu().double()  # (processes, statistics); MPS has no float64
        joined = {"min": rows.amin(0), "max": rows.amax(0), "mean": rows.mean(0)}
        kinds = (next((kind for kind in ("min", "max") if kind in name), "mean") for name in statistics)
        return {
            name: float(joined[kind][i]) for i, (name, kind) in enumerate(zip(statistics, kinds, strict=True))
        }

    def _evaluate(self, evaluator: Evaluator) -> dict[str, float | Tensor]:
        """Call an evaluator in the main process."""
        figures: dict[str, float | Tensor] = {}
        model = self.weights.averaged(keep=self.rank == 0)
        if model is not None:
            figures |= evaluator.call(self.step, model)
        self.accelerator.wait_for_everyone()
        return figures

    def _diagnose(self, batch: Batch) -> dict[str, float]:
        """How the gradients of likelihood and alignment compare on this process's share of the batch."""
        objective, config = self.weights.whole(), self.config.alignment
        assert isinstance(objective, Objective)
        assert objective.projector is not None
        assert self.targets is not None
        targets = self.targets(batch.indices, batch.flipped, batch.seen)
        weights = objective.weights(batch.levels)
        noised = Noised(
            batch.noised, batch.labels, batch.drop, batch.levels, weights, batch.alignment_weights
        )
        balance = gradient_balance(objective.flow, objective.projector, noised, targets, config)
        if config.stop_below is not None:
            self._stop_below(
                config.stop_below, [v for k, v in balance.items() if k.startswith("grad_cosine_")]
            )
        return balance

    def _stop_below(self, limit: float, cosines: Sequence[float]) -> None:
        """Stop aligning where the gradients' mean cosine, over blocks and processes, is below the limit.

        A process whose share of the batch has no aligned image does not count.
        """
        own = torch.tensor([sum(cosines) / max(len(cosines), 1), bool(cosines)], device=self.device)
        total, counted = self.accelerator.reduce(own, "sum").tolist()
        cosine = total / max(counted, 1)
        if counted and cosine < limit:
            self.stopped = True
            log.info(
                "Step %d: alignment stops, the gradients' mean cosine is %.3f (--alignment.stop-below %g).",
                *(self.step, cosine, limit),
            )

    # --- keeping ---

    def write(self, row: dict[str, Any], pictures: Mapping[str, Tensor]) -> None:
        """Append a row to metrics.jsonl, and show it and the pictures in the trackers."""
        if row:
            self.last = row
        if self.rank == 0 and (row or pictures):
            if row:
                self.folder.append("metrics.jsonl", row)
            show(self.accelerator, row, pictures, self.step)

    def save(self) -> None:
        """Start to write a checkpoint of the present state; afterwards old ones are removed."""
        self.writer.wait()  # so that no more than one copy of the state is held
        state, averages = self.weights.state(keep=self.rank == 0)
        if self.rank == 0:
            guard = gathered(self.guard.state_dict(), device=torch.device("cpu"))
            state |= {"guard": guard, "step": self.step, "seconds": self.seconds}
            state["alignment_stopped"] = self.stopped
            folder = self.folder.path / "checkpoints" / f"step-{self.step:08d}"
            self.writer.start(self._write, folder, state, averages)

    def _write(self, folder: Path, state: dict[str, Any], averages: Sequence[dict[str, Tensor]]) -> None:
        weights, *more = averages
        further = dict(zip(self.config.train.ema_more, more, strict=True))
        checkpoint.save(folder, self.config, weights, state, further)
        self.folder.remove_old()

    def finish(self) -> None:
        """Wait until everything is on disk, in all processes."""
        self.writer.wait()
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Release what a second run in this process, or the end of this process, would trip over."""
        self.writer.close()
        with contextlib.suppress(RuntimeError):  # a process that is lost, which has been said
            self.vote.close()
        self.accelerator.free_memory()
        self.accelerator.end_training()
