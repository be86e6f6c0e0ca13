"""What a training will take of a GPU's memory and of a calendar, computed before it is started.

Kept for backward, an image, of a swapped model, with N tokens of width D, H heads, a hidden width F, R rows that are
read (the class token's and the distillation token's), s bytes an element of the residual stream and m of the products'
operands (under autocast 4 and 2, else the same):

    pixels           C·height·width s
    whole blocks     (2·N·D) s + (4·N·D + N·F) m + 4·H·N      both inputs, qkv, attention's output, FC1's; log-sum-exp
    the last block   (N·D + R·D) s + (2·R·D + R·H·D + R·F) m + 4·(R·H·D + R·H)
    norm and heads   R·D s + R·D m

The last block is computed for R rows alone (`reference/readout.py`): of it stay its input, and of each row the queries,
absorbed into the keys' weight and not, what the softmax summed, and the MLP's. With memory="low" no N·F and R·F stay.
`tests/train/test_plan.py` compares this with what autograd keeps.
"""

from dataclasses import replace
from typing import NamedTuple

from deit_fast.benchmark.clock import interval
from deit_fast.benchmark.results import Results
from deit_fast.models import DeiTConfig, VisionTransformer
from deit_fast.models.registry import get_config, list_models


class Precision(NamedTuple):
    """Bytes an element: of parameters and the residual stream, and of what products multiply.

    dtype, amp: of a case of `deit-fast bench`.
    """

    stream: int
    operand: int
    dtype: str
    amp: str | None = None


PRECISIONS = {
    "bf16": Precision(2, 2, "bfloat16"),
    "amp": Precision(4, 2, "float32", "bfloat16"),
    "float32": Precision(4, 4, "float32"),
}
# Tensors like the parameters that each keeps.
OPTIMIZERS = {"adamw": 2, "lamb": 2, "sgd": 1}
_SECONDS_A_DAY = 86_400


def kept_for_backward(config: DeiTConfig, precision: str, memory: str = "balanced") -> int:
    """Bytes an image: the formula above."""
    stream, operand, *_ = PRECISIONS[precision]
    width, heads, read = config.embed_dim, config.num_heads, config.num_prefix_tokens
    tokens = read + config.num_patches
    hidden = 0 if memory == "low" else int(width * config.mlp_ratio)
    channels, height, columns = config.input_size
    block = 2 * tokens * width * stream + tokens * (4 * width + hidden) * operand + 4 * heads * tokens
    last = (tokens + read) * width * stream + read * ((2 + heads) * width + hidden) * operand
    last += 4 * read * heads * (width + 1)
    ends = channels * height * columns * stream + read * width * (stream + operand)
    return (config.depth - 1) * block + last + ends


def fixed_memory(
    config: DeiTConfig, precision: str, optimizer: str = "adamw", ema: bool = False, gpus: int = 1
) -> dict[str, int]:
    """Bytes a GPU of what is there whatever the batch, by what it is."""
    stream, operand, *_ = PRECISIONS[precision]
    parameters = list(VisionTransformer(config, device="meta").parameters())
    weights = stream * sum(parameter.numel() for parameter in parameters)
    # Tokens and positions have three dimensions.
    matrices = sum(parameter.numel() for parameter in parameters if parameter.ndim in (2, 4))
    found = {
        "weights": weights,
        "gradients": weights,
        f"{optimizer}'s state": OPTIMIZERS[optimizer] * weights,
        "moving average of the weights": weights if ema else 0,
        "gradients in DistributedDataParallel's buckets": weights if gpus > 1 else 0,
        "matrices cast by autocast": operand * matrices if operand < stream else 0,
    }
    return {what: size for what, size in found.items() if size}


def largest_batch(free: int, image: int) -> int:
    """Images a GPU that `free` bytes have room for."""
    return max(free // image, 0)


def days(images: int, images_per_second: float) -> float:
    """Of so many images over all epochs."""
    return images / images_per_second / _SECONDS_A_DAY


def measured(
    results: Results, config: DeiTConfig, precision: str, drop_path: float, batch: int
) -> tuple[float, int] | None:
    """Images a second of deit_fast's training step in `results`, and the batch: this one, or else the largest."""
    *_, dtype, amp = PRECISIONS[precision]
    found = {
        row.case.batch: row.case.batch / interval(row.seconds).median
        for row in results.rows
        if row.contender == "deit_fast"
        and row.seconds
        and row.case.training
        and row.case.drop_path == drop_path
        and (row.case.dtype, row.case.amp) == (dtype, amp)
        and row.case.model in list_models()
        and replace(get_config(row.case.model), img_size=row.case.img_size) == config
    }
    if not found:
        return None
    chosen = batch if batch in found else max(found)
    return found[chosen], chosen
