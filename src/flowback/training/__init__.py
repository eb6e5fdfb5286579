"""Training: the objective, the stream of images, the one loop."""

from flowback.training.loop import Evaluator, Interrupted, train
from flowback.training.objective import Targets
from flowback.training.processes import ProcessLostError, noticing_loss, start

__all__ = ["Evaluator", "Interrupted", "ProcessLostError", "Targets", "noticing_loss", "start", "train"]
