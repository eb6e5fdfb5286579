"""What a run trains and keeps: objective, optimiser, schedule, and averages of the trained weights."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch._functorch.config as functorch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from flowback.config import RunConfig, TrainConfig
from flowback.errors import InputError
from flowback.model import Flow, Student
from flowback.nn.transformer import Transformer
from flowback.training.distillation import StudentObjective
from flowback.training.distributed import gathered, held_bytes, local, scattered, shard
from flowback.training.objective import Objective
from flowback.training.warm_start import take_weights

__all__ = ["Weights", "average_decay", "learning_rate", "set_up_bodies", "update_average"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``min_lr`` at the last step (TARFlow's schedule).

    Args:
        config: the schedule.
        step: counted from 0.
    """
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * done))


def average_decay(decay: float, step: int) -> float:
    """Decay of a moving average at a step; short at first, so that the initial weights are forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Set average ← decay · average + (1 − decay) · weights, in place."""
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)


def set_up_bodies(bodies: Sequence[Transformer], config: RunConfig) -> None:
    """Checkpoint activations and compile, as the settings ask.

    Checkpointing changes no bit of a gradient: each layer is computed twice by the same code. Only the
    Transformer of each block is compiled; its projections, the affine transform and the alignment's graph
    stay eager. Compiled code sums in another order, so results differ by rounding.

    Raises:
        InputError: there is no C++ compiler, and the CPU needs one.
    """
    for body in bodies:
        body.checkpointing = config.train.checkpoint_activations
    if not config.train.compile:
        return
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if next(bodies[0].parameters()).device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise InputError(
            "--train.compile needs a C++ compiler, and none was found: install g++, or leave it out."
        )
    if config.alignment.active and config.alignment.strategy != "forward":
        functorch.donated_buffer = False  # their backward goes over a block's graph more than once
    for body in bodies:
        body.compile()


Module = TypeVar("Module", bound=nn.Module)


class Weights:
    """Objective, optimiser and averages; of a sharded run, this process's part of each.

    Args:
        config: the run; its seed gives the initial weights.
        target_dim: features of the encoder; None trains on likelihood alone.
        accelerator: joins gradients, unless they are sharded.
        sharded: keep a part in each process. All of them call every method then.
        init_from: flow whose weights a new run begins with; None draws them.
    """

    def __init__(
        self,
        config: RunConfig,
        target_dim: int | None,
        accelerator: Accelerator,
        sharded: bool,
        init_from: str | None = None,
    ) -> None:
        self.config, self.sharded, self.device = config, sharded, accelerator.device
        torch.manual_seed(config.train.seed)
        self.objective = StudentObjective(config) if config.student.active else Objective(config, target_dim)
        if init_from is not None:
            assert isinstance(self.objective, Objective)  # a student's run has no such option
            take_weights(self.objective.flow, init_from)
        # A copy without memory for weights; it is filled with those that are to be looked at.
        nothing = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in self.objective.parameters()
        }
        self._shell = copy.deepcopy(self.objective, nothing)
        if sharded:
            shard(self.objective, self.device)
        self.model: nn.Module = self.objective if sharded else accelerator.prepare(self.objective)
        """What a step calls. It joins the gradients of all processes; a sharded one does so, whatever
        ``no_sync`` says, in every backward pass, so that none stays whole."""
        train = config.train
        self._adamw = torch.optim.AdamW(
            self.objective.parameters(),
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self._optimizer = accelerator.prepare(self._adamw)
        weights = dict(self.objective.trained.named_parameters())
        self._averages = {
            decay: {name: weight.detach().clone() for name, weight in weights.items()}
            for decay in train.averages
        }
        set_up_bodies(self.objective.bodies, config)

    # --- a step ---

    def gradient_norm(self) -> Float[Tensor, ""]:
        """2-norm of the gradient, which is clipped as the settings ask."""
        limit = self.config.train.grad_clip or float("inf")
        return gathered(nn.utils.clip_grad_norm_(self.objective.parameters(), limit))

    def step(self, step: int, bad: Float[Tensor, ""]) -> None:
        """Update the weights, unless ``bad`` is 1, and their averages; ``step`` counts from 0."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.config.train, step)
        # The fused optimiser leaves a step out where found_inf is 1, on the device.
        self._adamw.found_inf = bad  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad()
        weights = local(self.objective.trained.parameters())
        for decay, average in self._averages.items():
            update_average(local(average.values()), weights, average_decay(decay, step))

    # --- looking ---

    @property
    def parameters(self) -> dict[str, int]:
        """Number of trained parameters, over all processes."""
        return self.objective.parameter_counts

    @property
    def held_bytes(self) -> int:
        """Memory of weights, optimiser and averages in this process between two steps."""
        moments = [value for state in self._adamw.state.values() for value in state.values()]
        averages = [value for average in self._averages.values() for value in average.values()]
        return held_bytes(self.objective.parameters(), moments, averages)

    def averaged(self, keep: bool) -> Flow | Student | None:
        """The flow or student with averaged weights, in eval mode; None unless ``keep``."""
        weights = gathered(self._averages[self.config.train.ema_decay], keep)
        if not keep:
            return None
        model = self._filled(self._shell.trained, weights).eval().requires_grad_(False)
        model.classes, model.run = self.config.classes, self.config
        return model

    def whole(self) -> Objective | StudentObjective:
        """The objective with all weights in this process, for gradients that are not joined."""
        return (
            self._filled(self._shell, gathered(self.objective.state_dict()))
            if self.sharded
            else self.objective
        )

    def _filled(self, shell: Module, weights: dict[str, Tensor]) -> Module:
        filled = copy.deepcopy(shell)
        filled.load_state_dict(weights, assign=True)  # these very tensors
        return filled.to(self.device)

    # --- keeping ---

    def state(self, keep: bool) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
        """Training state and averages for a checkpoint, whole where they are to be kept.

        They are copies in the CPU's memory, which do not change as training goes on.
        """
        training = {"objective": self.objective.state_dict(), "optimizer": self._optimizer.state_dict()}
        here = torch.device("cpu")
        return gathered(training, keep, here), gathered(list(self._averages.values()), keep, here)

    def restore(self, training: dict[str, Any], averages: dict[float, dict[str, Tensor]]) -> None:
        """Continue from a stored state, whole in every process.

        Raises:
            InputError: it is of another model. Nothing is changed then.
        """
        weights = dict(self.objective.named_parameters())
        _same_shapes("The training state", training["objective"], self.objective.state_dict())
        for decay, average in self._averages.items():
            _same_shapes(f"The average of decay {decay:g}", averages[decay], average)
        moments = training["optimizer"][
            "state"
        ]  # by the number of the parameter; empty before the first step
        for name in ("exp_avg", "exp_avg_sq") if moments else ():
            stored = {key: moments[i][name] for i, key in enumerate(weights) if name in moments.get(i, {})}
            _same_shapes(f"The optimiser's {name}", stored, weights)
        self.objective.load_state_dict(scattered(training["objective"], weights))
        parts = scattered(training["optimizer"], {"state": dict(enumerate(weights.values()))})
        self._optimizer.load_state_dict(parts)
        for decay, average in self._averages.items():
            for name, value in scattered(averages[decay], average).items():
                average[name].copy_(value)


def _same_shapes(what: str, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes; a sharded tensor's shape is that of the whole."""
    for name in [*own, *stored]:
        there, here = ((name in part and tuple(part[name].shape)) for part in (stored, own))
        if there != here:
            shown = [shape if shape is not False else "missing" for shape in (there, here)]
            raise InputError(
                f"{what} has another {name}: {shown[0]} in the checkpoint, {shown[1]} in the model; choose "
                "another --out, or the model, encoder and projector of that run."
            )
