"""Training: the objective, the stream of images, the one loop."""

from flowback.training.loop import Evaluator, Interrupted, train
from flowback.training.objective import Targets

__all__ = ["Evaluator", "Interrupted", "Targets", "train"]
