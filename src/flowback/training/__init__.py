"""Training: one call, the objective, the stream of images, the one loop."""

from flowback.training.distributed import noticing_loss, start
from flowback.training.evaluators import Evaluator
from flowback.training.loop import train_loop
from flowback.training.objective import Targets
from flowback.training.run import TrainResult, train

__all__ = ["Evaluator", "Targets", "TrainResult", "noticing_loss", "start", "train", "train_loop"]
