"""Step 5: whole blocks and models, stock and ours, eager and compiled."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.benchmark import clock, plain
from deit_fast.benchmark.gpu.blocks import Shape, steps
from deit_fast.check.accuracy import relative_error
from deit_fast.kernels.launching import tuned
from deit_fast.models import VisionTransformer
from deit_fast.models.config import DeiTConfig
from deit_fast.ops import backend

EAGER = ("stock", "deit_fast")
COMPILED = ("stock, compiled", "deit_fast, compiled")
DROP_PATH = 0.1  # of DeiT's recipe
FEW = 2  # images, whose logits are compared with float64's


def block_time(device: torch.device, shape: Shape, contender: str) -> dict[str, object]:
    """Seconds of a block's step."""
    torch._dynamo.reset()
    stock, ours = steps(shape, device)
    step = stock if contender.startswith("stock") else ours
    if contender.endswith("compiled"):
        step.block.compile(dynamic=False)
    return _timed(step, device)


def model_time(
    device: torch.device, config: DeiTConfig, batch: int, training: bool, contender: str
) -> dict[str, object]:
    """Seconds of a model's step in bfloat16, its logits' relative error against plain PyTorch in float64."""
    torch._dynamo.reset()
    step = model_step(device, config, batch, training, contender)
    return {**_timed(step, device), "images": batch, "error": _error(step.model, config, device)}


@dataclass
class ModelStep:
    """Forward, and in training cross-entropy and backward; no optimizer."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def __call__(self) -> None:
        if not self.model.training:
            with torch.inference_mode():
                self.model(self.images)
            return
        outputs = self.model(self.images)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        loss: Any = sum(F.cross_entropy(logits.float(), self.labels) for logits in heads)
        loss.backward()
        self.model.zero_grad()


def model_step(
    device: torch.device, config: DeiTConfig, batch: int, training: bool, contender: str = "deit_fast"
) -> ModelStep:
    torch.manual_seed(0)
    kind = plain.VisionTransformer if contender.startswith("stock") else VisionTransformer
    model = kind(config, drop_path_rate=DROP_PATH if training else 0.0).to(device, torch.bfloat16).train(training)
    if contender.endswith("compiled"):
        model.compile(dynamic=False)
    images = torch.randn(batch, *config.input_size, device=device, dtype=torch.bfloat16)
    return ModelStep(model, images, torch.randint(config.num_classes, (batch,), device=device))


def launch_model(device: torch.device, config: DeiTConfig, batch: int, training: bool) -> None:
    """Makes the launches of our model's step, for their kernels to be compiled."""
    # One block without drop path, one with it, and the one that is read out.
    model_step(device, replace(config, depth=min(config.depth, 3)), batch, training)()


def _error(model: nn.Module, config: DeiTConfig, device: torch.device) -> float:
    """Of the logits of a few images, relative, against plain PyTorch in float64 on the CPU."""
    images = torch.randn(FEW, *config.input_size, generator=torch.Generator().manual_seed(1))
    reference = plain.VisionTransformer(config)
    reference.load_state_dict(model.state_dict())
    training = model.training
    with torch.inference_mode():
        expected = reference.double().eval()(images.bfloat16().double())
        # Not its call, which would compile it once more, for these few.
        found = model.eval().forward(images.to(device, torch.bfloat16))
    model.train(training)
    return relative_error(found.cpu(), expected)


def _timed(step: Callable[[], object], device: torch.device) -> dict[str, object]:
    with tuned.enabled(False), backend.fallbacks() as fallbacks:
        watch = clock.GpuClock(device)
        torch.cuda.reset_peak_memory_stats(device)
        calls = watch.calls(step)
        seconds = watch.seconds(step, calls)
    return {
        "seconds": seconds,
        "peak bytes": torch.cuda.max_memory_allocated(device),
        "fallbacks": list(fallbacks),
    }
