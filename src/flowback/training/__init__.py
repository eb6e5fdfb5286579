"""Training: one call, the objective, the stream of images, the one loop."""

from flowback.training.distributed import noticing_loss, start
from flowback.training.evaluators import Evaluator
from flowback.training.loop import train_loop
from flowback.training.objective import Targets
from flowback.training.run import TrainResult, distil, student_config, train

__all__ = [
    "Evaluator",
    "Targets",
    "TrainResult",
    "distil",
    "noticing_loss",
    "start",
    "student_config",
    "train",
    "train_loop",
]
