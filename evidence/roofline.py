"""What the published peaks of a GPU allow each operator of DeiT, at most: computed, never measured.

    python -m evidence.roofline [--out evidence/results/roofline.md]

Writes the page. An operator takes no less than its floating-point operations at the GPU's peak, nor than its boundary
bytes at the bandwidth of its memory; the longer of the two is its bound. Both are counted as `evidence.traffic` counts
them: two operations a multiply-add of every matrix product; distinct inputs read once, outputs written once, weights
once a batch. The formulas below are these counts; the tests hold them to a swapped model's.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path

from deit_fast.benchmark.devices import Device, device
from deit_fast.benchmark.tables import table
from deit_fast.models.config import DeiTConfig
from deit_fast.models.registry import get_config
from evidence.models import IMAGE_SIZE

BATCH = 256
# Bytes an element: activations, weights and gradients; statistics and sums.
BF16, FP32 = 2, 4
GPUS = (
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA B200",
    "AMD Instinct MI300X",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA GeForce RTX 5090",
)
NAMES = {"tiny": "DeiT-Ti", "small": "DeiT-S", "base": "DeiT-B"}
PAGE = Path(__file__).with_name("results") / "roofline.md"


# What one call costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """flops, activations (bytes): an image's. weights (bytes): a batch's, gradients of weights included."""

    flops: int
    activations: int
    weights: int

    def bytes(self, batch: int) -> float:
        """An image's, of a batch of `batch`."""
        return self.activations + self.weights / batch

    def seconds(self, gpu: Device, batch: int) -> tuple[float, float]:
        """Of a batch: its operations at the GPU's peak, its bytes at its bandwidth."""
        return batch * self.flops / (gpu.bf16 * 1e12), batch * self.bytes(batch) / (gpu.bandwidth * 1e9)


# rows: token rows of one image; k, n: inputs and outputs of a linear layer. A backward operator computes a product for
# its input's gradient and one for its weight's, reads the weights and writes their gradients.


def linear(rows: int, k: int, n: int) -> Cost:
    return Cost(2 * rows * k * n, BF16 * rows * (k + n), BF16 * (k * n + n))


def linear_residual(rows: int, k: int, n: int) -> Cost:
    plain = linear(rows, k, n)
    return Cost(plain.flops, plain.activations + BF16 * rows * n, plain.weights)


def linear_backward(rows: int, k: int, n: int) -> Cost:
    forward = linear(rows, k, n)
    return Cost(2 * forward.flops, forward.activations + BF16 * rows * k, 2 * forward.weights)


def layer_norm(rows: int, d: int) -> Cost:
    return Cost(0, BF16 * rows * 2 * d, BF16 * 2 * d)


def layer_norm_backward(rows: int, d: int) -> Cost:
    return Cost(0, BF16 * rows * 3 * d, BF16 * 4 * d)


def layer_norm_linear(rows: int, k: int, n: int) -> Cost:
    plain = linear(rows, k, n)
    return Cost(plain.flops, plain.activations, plain.weights + BF16 * 2 * k)


def layer_norm_linear_backward(rows: int, k: int, n: int) -> Cost:
    """With the gradient of the residual, which goes past it and is added to the input's."""
    plain = linear_backward(rows, k, n)
    return Cost(plain.flops, plain.activations + BF16 * rows * k, plain.weights + BF16 * 4 * k)


def layer_norm_fc1(rows: int, k: int, n: int) -> Cost:
    """What goes into the activation and what comes out."""
    plain = layer_norm_linear(rows, k, n)
    return Cost(plain.flops, plain.activations + BF16 * rows * n, plain.weights)


def fc2_residual(rows: int, k: int, n: int) -> Cost:
    """What goes into the activation is for its backward alone."""
    return linear_residual(rows, k, n)


def attention(tokens: int, d: int, heads: int) -> Cost:
    return Cost(4 * tokens**2 * d, BF16 * tokens * 4 * d + FP32 * tokens * heads, 0)


def attention_backward(tokens: int, d: int, heads: int) -> Cost:
    return Cost(10 * tokens**2 * d, BF16 * tokens * 8 * d + FP32 * tokens * heads, 0)


def readout_attention(tokens: int, d: int, heads: int, rows: int) -> Cost:
    """Attention of the `rows` that the classifiers read (`reference/readout.py`).

    It writes these rows before and after, and for backward q, the absorbed queries, what the softmax summed and its
    log-sum-exp.
    """
    projection, over_tokens = 2 * rows * d * d, 2 * rows * heads * tokens * d
    kept = rows * (BF16 * d + (BF16 + FP32) * heads * d + FP32 * heads)
    activations = BF16 * (tokens + 2 * rows) * d + kept
    return Cost(3 * projection + 2 * over_tokens, activations, layer_norm_linear(tokens, d, 3 * d).weights)


def readout_attention_backward(tokens: int, d: int, heads: int, rows: int) -> Cost:
    forward = readout_attention(tokens, d, heads, rows)
    projection, over_tokens = 2 * rows * d * d, 2 * rows * heads * tokens * d
    return Cost(6 * projection + 5 * over_tokens, forward.activations + BF16 * tokens * d, 2 * forward.weights)


def patch_embed(pixels: int, patches: int, tokens: int, d: int) -> Cost:
    """pixels: values of an image, all channels. Positions and prefix tokens are weights."""
    weights = d * (pixels // patches + 1 + tokens + tokens - patches)
    return Cost(2 * pixels * d, BF16 * (pixels + tokens * d), BF16 * weights)


def patch_embed_backward(pixels: int, patches: int, tokens: int, d: int) -> Cost:
    """Of the weights alone: nobody wants the images' gradient."""
    forward = patch_embed(pixels, patches, tokens, d)
    return Cost(forward.flops, forward.activations, 2 * forward.weights)


BACKWARD = {
    forward: backward
    for forward, backward in (
        (linear, linear_backward),
        (linear_residual, linear_backward),
        (fc2_residual, linear_backward),
        (layer_norm, layer_norm_backward),
        (layer_norm_linear, layer_norm_linear_backward),
        (layer_norm_fc1, layer_norm_linear_backward),
        (attention, attention_backward),
        (readout_attention, readout_attention_backward),
        (patch_embed, patch_embed_backward),
    )
}


# What a model calls -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """An operator of one step: what of the model it computes, how often it is called, and what one call costs."""

    operator: str
    part: str
    times: int
    cost: Cost


def calls(config: DeiTConfig, training: bool) -> list[Call]:
    """Of a swapped model: forward, and backward in training, with drop path off and the last block read out."""
    patches, read = config.num_patches, config.num_prefix_tokens
    tokens, d, heads = patches + read, config.embed_dim, config.num_heads
    hidden, pixels = int(d * config.mlp_ratio), math.prod(config.input_size)
    blocks, last = config.depth - 1, "last block, "

    attend = [(layer_norm_linear, "QKV", (tokens, d, 3 * d)), (attention, "attention", (tokens, d, heads))]

    def rest(rows: int) -> list[tuple[Callable[..., Cost], str, tuple[int, ...]]]:
        first, second = (layer_norm_fc1, fc2_residual) if training else (layer_norm_linear, linear_residual)
        layers = [(first, "FC1", (rows, d, hidden)), (second, "FC2", (rows, hidden, d))]
        return [(linear_residual, "projection", (rows, d, d)), *layers]

    forward = [
        (1, patch_embed, "patches", (pixels, patches, tokens, d)),
        *((blocks, cost, part, shape) for cost, part, shape in attend + rest(tokens)),
        (1, readout_attention, f"{last}attention", (tokens, d, heads, read)),
        *((1, cost, last + part, shape) for cost, part, shape in rest(read)),
        (1, layer_norm, "last norm", (read, d)),
        (read, linear, "classifiers", (1, d, config.num_classes)),
    ]
    found = [Call(cost.__name__, part, times, cost(*shape)) for times, cost, part, shape in forward]
    if training:
        for times, cost, part, shape in reversed(forward):
            backward = BACKWARD[cost]
            found.append(Call(backward.__name__, part, times, backward(*shape)))
    return found


def bound(found: Sequence[Call], gpu: Device, batch: int) -> float:
    """Seconds a batch, one operator after the other."""
    return sum(call.times * max(call.cost.seconds(gpu, batch)) for call in found)


# The page ---------------------------------------------------------------------------------------------------------

# Their authors' measurements: model and step, GPU, batch, how, images a second, whose.
PEERS = (
    ("DeiT-Ti, inference", "RTX 5090", 1024, "AMP, `torch.compile`", 32_757, "timm"),
    ("DeiT-S, inference", "RTX 5090", 1024, "AMP, `torch.compile`", 13_256, "timm"),
    ("DeiT-B, inference", "RTX 5090", 1024, "AMP, `torch.compile`", 4_369, "timm"),
    ("ViT-5-Small, training", "H100 SXM", 256, "bfloat16, eager", 1_608, "nvSubquadratic, original"),
    ("ViT-5-Small, training", "H100 SXM", 256, "bfloat16, `torch.compile`", 5_560, "nvSubquadratic, original"),
    ("ViT-5-Small, training", "H100 SXM", 256, "bfloat16, eager", 2_305, "nvSubquadratic, optimized"),
    ("ViT-5-Small, training", "H100 SXM", 256, "bfloat16, `torch.compile`", 7_716, "nvSubquadratic, optimized"),
    ("ViT-5-Small, training", "H100 SXM", 256, "bfloat16, max-autotune", 8_003, "nvSubquadratic, optimized"),
)

_ABOUT = f"""\
# What the hardware allows

Computed from the vendors' data sheets, **not measured**: `python -m evidence.roofline` writes this page. No kernel
reaches these bounds; how near ours come is for a GPU to say.

DeiT-Ti, -S and -B distilled at {IMAGE_SIZE} pixels, swapped, all in bfloat16, batch {BATCH}. An operator takes no
less than its floating-point operations at the GPU's peak (F) and no less than its boundary bytes at the bandwidth of
its memory (B): the longer of the two is its bound, and operators run one after the other.

- Operations: two a multiply-add of every matrix product; softmax, GELU and LayerNorm count as none.
- Boundary bytes: distinct inputs read once, outputs written once, weights and their gradients once a batch. What an
  earlier operator left in a cache can be read faster than that.
- A training step is forward and backward with drop path off, without loss and optimizer.
- `linear` is the classifiers' stock layer. What PyTorch does beside these operators is left out: it copies a few rows,
  and one block's weight gradient.
"""

_PEERS = """
Measured by others, each on their own code, as they published it; nothing of deit_fast is among it. timm's are the same
models, stock; ViT-5-Small has 22 million parameters, and DeiT-S's width and depth:
"""

_SOURCES = """
- timm: `results/benchmark-infer-amp-nchw-pt291-cu130-5090-dynamo.csv` in huggingface/pytorch-image-models.
- nvSubquadratic: `benchmarks/README.md` in NVIDIA-BioNeMo/nvSubquadratic, before and after its authors' optimizations.
"""


def figure(value: float) -> str:
    """Three significant digits."""
    decimals = 2 - floor(log10(value)) if value else 0
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def peaks_table(gpus: Sequence[Device]) -> str:
    rows = (
        (gpu.name, f"{gpu.bf16:,g}", f"{gpu.bandwidth:,g}", f"{1000 * gpu.bf16 / gpu.bandwidth:.0f}", gpu.source)
        for gpu in gpus
    )
    return table(("GPU", "bfloat16 TFLOP/s:", "GB/s:", "FLOPs a byte where F = B:", "data sheet"), rows)


def summary_table(steps: dict[tuple[str, str], list[Call]], gpus: Sequence[Device]) -> str:
    rows = ((*what, *(figure(BATCH / bound(found, gpu, BATCH)) for gpu in gpus)) for what, found in steps.items())
    return table(("model", "step", *(f"{gpu.name}:" for gpu in gpus)), rows)


def operators_table(found: Sequence[Call], gpus: Sequence[Device]) -> str:
    """A row for one call of each operator, and one for all calls of the step."""
    rows, all_flops, all_bytes = [], 0, 0.0
    for call in found:
        flops, moved = call.cost.flops, call.cost.bytes(BATCH)
        all_flops, all_bytes = all_flops + call.times * flops, all_bytes + call.times * moved
        bounds = []
        for gpu in gpus:
            computing, moving = call.cost.seconds(gpu, BATCH)
            bounds.append(f"{figure(1e6 * max(computing, moving))} {'F' if computing > moving else 'B'}")
        rows.append((f"`{call.operator}`", call.part, call.times, *_counts(flops, moved), *bounds))
    bounds = (f"**{figure(1e6 * bound(found, gpu, BATCH))}**" for gpu in gpus)
    rows.append(("**all calls**", "", sum(call.times for call in found), *_counts(all_flops, all_bytes), *bounds))
    columns = ("operator", "of", "calls:", "GFLOPs an image:", "MB an image:", "FLOPs a byte:")
    return table((*columns, *(f"{gpu.name}, µs:" for gpu in gpus)), rows)


def _counts(flops: int, moved: float) -> tuple[str, str, str]:
    return figure(flops / 1e9), figure(moved / 1e6), figure(flops / moved)


def page() -> str:
    """All of it, as Markdown."""
    gpus = [device(name) for name in GPUS]
    steps = {
        (model, step): calls(get_config(f"deit_{size}_distilled_patch16_{IMAGE_SIZE}"), step == "training")
        for size, model in NAMES.items()
        for step in ("inference", "training")
    }
    peers = ((*peer[:4], f"{peer[4]:,}", peer[5]) for peer in PEERS)
    parts = [
        _ABOUT,
        peaks_table(gpus),
        "\n## The whole model\n\nImages a second at the bound, computed:\n",
        summary_table(steps, gpus),
        _PEERS,
        table(("model, step", "GPU", "batch:", "how", "images a second:", "published by"), peers),
        _SOURCES,
        "## Each operator\n\nOne call; µs are a batch's, each with what bounds it, computed.",
    ]
    for (model, step), found in steps.items():
        parts.append(f"\n### {model}, {step}\n\n{operators_table(found, gpus)}")
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.parse_args().out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
