"""The launches that models make on one GPU, recorded from the running models, none compiled yet."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from deit_fast.benchmark.outputs import summed
from deit_fast.check.standin_driver import RecordedLaunch, recording
from deit_fast.check.targets import Target
from deit_fast.kernels.launching.hardware import NO_FLOAT32_PRODUCTS
from evidence.models import build

# timm's names and image sizes; what OPTIONS changes of them.
MODELS = {
    "tiny": ("deit_tiny_distilled_patch16_224", 224),
    "small": ("deit_small_distilled_patch16_224", 224),
    "base": ("deit_base_distilled_patch16_224", 224),
    "tiny-384": ("deit_tiny_distilled_patch16_224", 384),
    "small-384": ("deit_small_distilled_patch16_224", 384),
    "base-384": ("deit_base_distilled_patch16_384", 384),
    "3-large": ("deit3_large_patch16_224", 224),
    "3-huge": ("deit3_huge_patch14_224", 224),
    # Other heads at widths that are here already: attention and what is read out are all that differs.
    "heads-96": ("deit_tiny_distilled_patch16_224", 224),
    "heads-128": ("deit_small_distilled_patch16_224", 224),
    # Heads of 32, of few tokens.
    "micro": ("deit_tiny_distilled_patch16_224", 64),
    # Separate queries, keys and values.
    "transformers-small": ("small", 224),
}
OPTIONS = {
    "heads-96": {"num_heads": 2},
    "heads-128": {"num_heads": 3},
    "micro": {"embed_dim": 96, "num_heads": 3},
}
# The dtype of the dots, and whether the model is float32 and under autocast, or cast as a whole.
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "autocast-bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
    "autocast-fp16": (torch.float16, True),
    "fp32": (torch.float32, False),
}
# What the kernels are known not to take; these reasons are said in the table.
LEFT_TO_STOCK = ("do not fit on chip", "do not fit in registers")
SUITES = ("inference", "training")
CLASSES = 1000


def recorded(
    target: Target, models: Sequence[str], suites: Sequence[str], precisions: Sequence[str], batch: int
) -> Iterator[tuple[str, str, RecordedLaunch]]:
    """Model, precision and launch, of every launch, in order."""
    from deit_fast.ops import backend

    torch.set_num_threads(1)
    with (
        backend.forced("triton"),
        recording(target, compiling=False) as launches,
        warnings.catch_warnings(),
    ):
        # Any other fallback to the stock operators would hide a kernel from the table.
        warnings.filterwarnings("error", message="deit_fast.*stock PyTorch operators")
        warnings.filterwarnings("ignore", message=f"deit_fast.*({'|'.join(LEFT_TO_STOCK)})")
        if target.name in NO_FLOAT32_PRODUCTS:
            # Nothing to compile, and the stock operators take their time.
            precisions = [precision for precision in precisions if precision != "fp32"]
        for model, precision, run in _runs(models, suites, precisions, batch):
            launches.clear()
            run()
            yield from ((model, precision, launch) for launch in launches)


def _runs(
    models: Sequence[str], suites: Sequence[str], precisions: Sequence[str], batch: int
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    for name in models:
        # The last block is read out; drop path begins with the second.
        plain, dropping = _build(name, 2), _build(name, 3, drop_path_rate=0.1)
        size = MODELS[name][1]
        for precision in precisions:
            dtype, autocast = PRECISIONS[precision]
            images = torch.zeros(batch, 3, size, size, dtype=torch.float32 if autocast else dtype)
            if "inference" in suites:
                yield name, precision, partial(_infer, plain, images, dtype, autocast)
            # Nobody trains in float16 alone: small updates would vanish in its weights.
            if "training" in suites and precision != "fp16":
                for model in (plain, dropping):
                    yield name, precision, partial(_train, model, images, dtype, autocast)
    if "inference" in suites:
        for precision in precisions:
            yield "vendor's GEMM", precision, partial(_around_the_vendors_gemm, *PRECISIONS[precision])
            yield "pixels", precision, partial(_pixels, PRECISIONS[precision][0], batch)
    if "training" in suites:
        for precision in precisions:
            yield "pixels", precision, partial(_mixed_pixels, PRECISIONS[precision][0], batch)
            yield "distillation", precision, partial(_train_loss, PRECISIONS[precision][0], batch)


def _build(name: str, depth: int, **options) -> nn.Module:
    import deit_fast

    if name.startswith("transformers-"):
        model = build("transformers", MODELS[name][0], depth)
    else:
        model = timm_model(name, depth, **options)
    deit_fast.swap(model)
    return model


def timm_model(name: str, depth: int, **options) -> nn.Module:
    """One of MODELS that is timm's, not swapped."""
    import timm

    model, size = MODELS[name]
    return timm.create_model(model, img_size=size, depth=depth, **OPTIONS.get(name, {}), **options)


def _infer(model: nn.Module, images: Tensor, dtype: torch.dtype, autocast: bool) -> None:
    model.eval().to(torch.float32 if autocast else dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        model(images)


def _train(model: nn.Module, images: Tensor, dtype: torch.dtype, autocast: bool) -> None:
    model.train().to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        outputs = model(images.requires_grad_())
    # Whatever their values are: no kernel has run.
    summed(outputs).backward()


def _around_the_vendors_gemm(dtype: torch.dtype, autocast: bool) -> None:
    """Forward and backward, whether the shipped table chooses it or `deit-fast tune` may."""
    from deit_fast import ops
    from deit_fast.kernels.linear import settings

    wide = torch.float32 if autocast else dtype
    with mock.patch.object(settings, "vendor", lambda *_: True), torch.autocast("cpu", dtype, enabled=autocast):
        x, vector, factors = torch.zeros(2, 16, 64, dtype=wide), torch.zeros(64, dtype=wide), torch.ones(2, dtype=wide)
        hidden, weight = torch.zeros(2, 16, 64, dtype=dtype), torch.zeros(64, 64, dtype=dtype)
        ops.linear(hidden, weight, vector, "gelu")
        for leaf in (x, vector, hidden, weight):
            leaf.requires_grad_()
        outputs = []
        for kept in (None, ops.keep_samples(factors)):
            of_fc1 = ops.layer_norm_fc1(x, vector, vector, 1e-6, weight, vector, "gelu", kept)
            for scales in ((None, None), (None, factors), (vector, factors)):
                outputs.append(ops.linear_residual(hidden, weight, vector, x, *scales, kept))
                outputs.append(ops.fc2_residual(*of_fc1, weight, vector, x, *scales, "gelu", kept))
        summed(tuple(outputs)).backward()


def _pixels(dtype: torch.dtype, batch: int, **mixed: Tensor | None) -> None:
    from deit_fast import ops

    images, statistics = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8), (torch.zeros(3), torch.ones(3))
    ops.normalise_pixels(images, *statistics, dtype, **mixed)


def _mixed_pixels(dtype: torch.dtype, batch: int) -> None:
    """mixup and CutMix of a whole batch, both of each image, with and without random erasing."""
    shares, boxes = torch.zeros(batch, 2), torch.zeros(batch, 4, dtype=torch.int32)
    erasing = {"erased": torch.zeros(batch, 1, 5, dtype=torch.int32), "noise": torch.zeros(2**20)}
    for erased in ({}, erasing):
        for mixed in ({"shares": shares}, {"boxes": boxes}, {"shares": shares, "boxes": boxes}):
            _pixels(dtype, batch, **erased, **mixed)
    _pixels(dtype, batch, **erasing)


def _train_loss(dtype: torch.dtype, batch: int) -> None:
    from deit_fast.ops.loss import distillation_loss

    heads = [torch.zeros(batch, CLASSES, dtype=dtype, requires_grad=True) for _ in range(2)]
    teacher, mixed = torch.zeros(batch, CLASSES), torch.full((batch, CLASSES), 1 / CLASSES)
    for kind in ("hard", "soft"):
        for targets in (torch.zeros(batch, dtype=torch.int64), mixed):
            distillation_loss(*heads, targets, teacher, kind, 0.5, 3.0, label_smoothing=0.1).backward()
