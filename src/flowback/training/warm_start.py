"""Begin a run with the weights of another flow, on other images and other classes perhaps."""

from __future__ import annotations

import logging

import torch

from flowback.errors import InputError
from flowback.model import Flow

__all__ = ["take_weights"]

log = logging.getLogger("flowback")


@torch.no_grad()
def take_weights(flow: Flow, name: str) -> None:
    """Copy the averaged weights of a flow into a new one of the same sizes.

    Classes are matched by name, or by number if neither flow knows names and they have as many. The embedding
    of a class that the other flow does not have is the mean of its classes: the one it sees without a label.

    Args:
        flow: a new flow; changed in place.
        name: run, checkpoint or name on the Hub.

    Raises:
        InputError: there is no such flow, or it has other sizes.
    """
    source = Flow.from_pretrained(name)
    if "range" in (flow.config.noise, source.config.noise) and flow.config.noise != source.config.noise:
        raise InputError(
            f"--train.init-from {name} has the noise {source.config.noise}, this run {flow.config.noise}: a "
            "flow of one noise level cannot begin as one with a range of them, nor the other way round; give "
            f"--model.noise {source.config.noise}."
        )
    own, theirs = flow.state_dict(), source.state_dict()
    rows = _rows(flow, source, name)
    for key, value in own.items():
        other = theirs.get(key)
        if key.endswith("class_table") and other is not None:
            with_mean = torch.cat([other, other.mean(0, keepdim=True)])
            value.copy_(with_mean[rows])
            continue
        if other is None or other.shape != value.shape:
            found = "not there" if other is None else f"of the shape {tuple(other.shape)}"
            raise InputError(
                f"--train.init-from {name} is another flow: its {key} is {found}, not {tuple(value.shape)}; "
                f"give the --model options that `flowback info {name}` shows."
            )
        value.copy_(other)
    new = rows.count(len(source.classes) or source.config.num_classes or 0)
    log.info("Weights: those of %s; %d of %d classes are new to it.", name, new, flow.config.num_classes or 0)


def _rows(flow: Flow, source: Flow, name: str) -> list[int]:
    """For each class its row in the other's table, whose last row is the mean."""
    ours, theirs = flow.config.num_classes or 0, source.config.num_classes or 0
    if bool(ours) != bool(theirs):
        raise InputError(
            f"--train.init-from {name} has {theirs or 'no'} classes, this run {ours or 'none'}; a flow with "
            "classes cannot begin as one without, nor the other way round."
        )
    if flow.classes and source.classes:
        numbers = {each: index for index, each in enumerate(source.classes)}
        return [numbers.get(each, theirs) for each in flow.classes]
    if ours != theirs:
        raise InputError(
            f"--train.init-from {name} has {theirs} classes, this run {ours}, and their names are not known "
            "to both; give data with the same number of classes."
        )
    return list(range(ours))
