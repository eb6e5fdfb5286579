"""Training: the objective, the stream of images, the one loop."""

from flowback.training.distributed import noticing_loss, start
from flowback.training.loop import Evaluator, train
from flowback.training.objective import Targets

__all__ = ["Evaluator", "Targets", "noticing_loss", "start", "train"]
