"""Training: one call, the objective, the stream of images, the one loop."""

from flowback.training.distributed import noticing_loss, start
from flowback.training.evaluators import Evaluator
from flowback.training.loop import classes_shown, train_loop
from flowback.training.objective import Targets
from flowback.training.run import TrainResult, distil, student_config, train
from flowback.training.trial import Trial, try_run

__all__ = [
    "Evaluator",
    "Targets",
    "TrainResult",
    "Trial",
    "classes_shown",
    "distil",
    "noticing_loss",
    "start",
    "student_config",
    "train",
    "train_loop",
    "try_run",
]
