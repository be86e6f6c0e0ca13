"""What a training loop needs beside the model: so far, the distillation loss."""

from deit_fast.train.distillation import DistillationLoss

__all__ = ["DistillationLoss"]
