"""The one training loop. Run again on the same folder, it continues where it stopped, bit for bit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.errors import InputError, Interrupted
from flowback.progress import bar, on_terminal
from flowback.training.batches import batches, noticing_dead_workers
from flowback.training.distributed import noticing_loss, signals, start
from flowback.training.evaluators import Evaluator
from flowback.training.objective import Targets
from flowback.training.trainer import Trainer

__all__ = ["check_fit", "classes_shown", "train_loop"]

log = logging.getLogger("flowback")

SHOWN = 8
"""Class names that a run shows at its start."""


def train_loop(
    config: RunConfig,
    images: ImageSet,
    out: Path,
    targets: Targets | None = None,
    evaluators: Sequence[Evaluator] = (),
    description: str = "train",
) -> dict[str, Any]:
    """Train a flow or a student until ``config.train.steps``; continues the run in ``out``, if there is one.

    :func:`flowback.train` and :func:`flowback.distil` call it with everything that it needs. All
    processes of a run call it with the same arguments, and see the same folder.

    Args:
        config: all settings, with the number of classes known.
        images: the training images.
        out: the run's folder: config.json, environment.json, metrics.jsonl, checkpoints/.
        targets: gives the encoder's features of a batch; needed when alignment is active.
        evaluators: called at their intervals with the averaged flow, in the main process.
        description: shown beside the progress bar.

    Returns:
        The last row of metrics: ``step``, ``images``, ``nll``, ``seconds`` of training alone, ...

    Raises:
        InputError: the folder holds another run, or options changed that must not.
        BadGradientError: too many steps had a bad gradient; the last good checkpoint remains.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        ProcessLostError: another process of the run died; the last checkpoint remains.
    """
    state = start(config.train)
    check_fit(config, images, state.num_processes)
    if config.alignment.active and targets is None:
        raise InputError("Alignment is active, but no encoder features were given; pass targets.")
    trainer = None
    try:
        with noticing_loss(state), noticing_dead_workers():
            trainer = Trainer(config, images, Path(out), targets)
            if state.is_main_process:
                _announce(trainer)
            _loop(trainer, evaluators, description)
            return trainer.last
    except KeyboardInterrupt:
        if trainer is not None:
            trainer.vote.abandon()
        raise
    finally:
        if trainer is not None:
            trainer.close()


def _loop(trainer: Trainer, evaluators: Sequence[Evaluator], description: str) -> None:
    config, train = trainer.config, trainer.config.train
    with signals() as asked, bar("images") as progress, ExitStack() as stack:
        task = progress.add_task(description, total=train.steps * train.batch_size, note="")
        progress.update(task, completed=trainer.step * train.batch_size)
        originals = trainer.targets.originals if trainer.targets is not None else None
        place = trainer.step, trainer.rank, trainer.processes, trainer.device
        # Closed before the run is: a worker that dies while it closes would interrupt it.
        stream = stack.enter_context(closing(batches(trainer.images, config, *place, originals)))
        started = time.perf_counter()
        for batch in stream:
            losses, gradient = trainer.update(batch)
            trainer.seconds += time.perf_counter() - started  # looking and saving are not training
            row, pictures = trainer.look(batch, losses, gradient, evaluators)
            progress.advance(task, train.batch_size)
            if "lr" in row:
                progress.update(task, note="{} {:.4f}".format(*_loss(row)))
                if trainer.rank == 0 and not on_terminal():
                    log.info("%s", _line(row, train.steps, train.batch_size))
            trainer.write(row, pictures)
            stop = trainer.vote(bool(asked))
            if stop or trainer.due(train.save_every):
                trainer.save()
            trainer.writer.check()
            if stop:
                trainer.finish()
                by = f"signal {asked[0]}" if asked else "a signal to another process"
                raise Interrupted(f"Stopped by {by}; saved in {trainer.folder.path}")
            started = time.perf_counter()
        trainer.finish()


def _line(row: dict[str, Any], steps: int, batch_size: int) -> str:
    """A row of metrics for those who read a file, not a bar."""
    speed = row["images_per_second"]
    left = (steps - row["step"]) * batch_size / speed if speed else 0.0
    return (
        "Step {:,} of {:,}: {} {:.4f}, ".format(row["step"], steps, *_loss(row)) + f"{speed:.3g} images/s, "
        f"{timedelta(seconds=round(left))} left"
    )


def _loss(row: dict[str, Any]) -> tuple[str, float]:
    """The loss that is shown while a run goes on: a flow's nll, or a student's."""
    name = "nll" if "nll" in row else "loss"
    return name, row[name]


def classes_shown(classes: Sequence[str]) -> str:
    """Number of classes, and the ids and names of the first ones."""
    named = [f"{number} = {name}" for number, name in enumerate(classes[:SHOWN])]
    more = ", ..." if len(classes) > SHOWN else ""
    return f"{len(classes)} classes ({', '.join(named)}{more})" if named else "no classes"


def _announce(trainer: Trainer) -> None:
    """What the run is, before its first step."""
    config, images, train = trainer.config, trainer.images, trainer.config.train
    size = f"{config.model.image_size}x{config.model.image_size}x{config.model.channels}"
    classes = classes_shown(images.classes)
    if images.classes and not config.model.num_classes:
        classes += ", not used: the model is unconditional"
    log.info("Images: %s of %s, %s, %s.", f"{len(images):,}", images.name, size, classes)
    counted = [f"{count:,} {name}" for name, count in trainer.weights.parameters.items()]
    log.info("Parameters: %s; device %s.", ", ".join(counted), trainer.device)
    share = train.batch_size // trainer.processes
    micro = min(train.micro_batch or share, share)
    log.info(
        "Batch: %d images in %d process%s, %d in each, in %d accumulation step%s of %d.",
        *(train.batch_size, trainer.processes, "" if trainer.processes == 1 else "es"),
        *(share, -(-share // micro), "" if micro == share else "s", micro),
    )
    if trainer.step >= train.steps:
        log.warning(
            "%s has %s steps already, and --train.steps is %s: nothing is trained.",
            *(trainer.folder.path, f"{trainer.step:,}", f"{train.steps:,}"),
        )
        return
    log.info("Run: %s, from step %s to %s.", trainer.folder.path, f"{trainer.step:,}", f"{train.steps:,}")


def check_fit(config: RunConfig, images: ImageSet, processes: int = 1) -> None:
    """Refuse other classes than the model's, and a batch that the processes cannot share evenly."""
    classes, count = config.model.num_classes, len(images.classes)
    if classes is None or classes not in (0, count):
        raise InputError(
            f"--model.num-classes is {classes}, but {images.name} has {count} classes; "
            f"leave the option out, or set it to {count} (0: unconditional)."
        )
    if config.train.batch_size % processes:
        raise InputError(
            f"--train.batch-size {config.train.batch_size} is not divisible by {processes} processes; "
            "choose a multiple."
        )
