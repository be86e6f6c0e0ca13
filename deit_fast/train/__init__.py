"""Training: the distillation loss, recipes, and the run that `deit-fast train` starts."""

from deit_fast.train.distillation import DistillationLoss

__all__ = ["DistillationLoss"]
