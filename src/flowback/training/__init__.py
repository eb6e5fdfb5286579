"""Training: the objective, the stream of images, the one loop."""

from flowback.training.loop import Evaluator, train
from flowback.training.objective import Targets
from flowback.training.processes import noticing_loss, start

__all__ = ["Evaluator", "Targets", "noticing_loss", "start", "train"]
