"""What one block's kernels load and store, counted in Triton's interpreter, against its operators' boundary bytes.

    python -m evidence.memory [--size tiny|small|base] [--batch 1] [--training] [--precision bf16|autocast-bf16]

A count on the CPU with an sm_80's tiles: no GPU is measured. Loads count as the kernels make them, masked lanes left
out; which of them a cache answers is not its business. 'Distinct' counts each byte of a tensor once a launch.

- First, every launch: how often it loads each byte of its tensors, and how often its tiling says that it should.
- Then, every operator, in D bytes a token (D: the width; tensors that grow with the tokens). 'Boundary' is what
  `evidence.traffic` counts: distinct inputs and outputs. 'Sum' is what the launches move: the boundary's bytes once,
  what further launches of the same operator read again, and what passes only between them.
- Last, the sum of the block against what the design promises, and, at a training batch, with what does not grow with
  the tokens: weights, their gradients, and the partial sums of these. That batch is not run: launches are recorded
  with their arguments, each of whose bytes counts once.

Exits with 1 if the sum is more than a tenth above the promise, if an operator's boundary is not what its launches
touch, if a tensor is loaded other than its tiling explains, or if memory is not written exactly once.
"""

import argparse
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext

import torch

from evidence.access_counter import Access, CountedCall, CountedLaunch, Counts, Moved, counting
from evidence.models import SIZES, TOKENS
from evidence.tilings import Explanation, explanations
from evidence.traffic import PRECISIONS

# D bytes a token and block.
PROMISED_TRAINING = {"bf16": 184, "autocast-bf16": 220}
PROMISED_INFERENCE = {"bf16": 52, "autocast-bf16": 64}
ALLOWED = 1.1
# Between a count and its explanation; and between an operator's boundary and what its launches touch of it.
TOLERANCE = 0.01
TRAINING_BATCH = 32


def count_block(
    width: int,
    heads: int,
    tokens: int,
    batch: int,
    *,
    training: bool,
    precision: str = "bf16",
    execute: bool = True,
) -> Counts:
    """One block's forward, and backward where `training`."""
    from deit_fast.nn import Block
    from deit_fast.ops import backend

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    block = Block(width, heads, qkv_bias=True).to(dtype)
    x, grad = (torch.randn(batch, tokens, width).to(dtype) for _ in range(2))
    rows = batch * tokens
    if any(parameter.numel() % rows == 0 for parameter in block.parameters()):
        raise ValueError(f"{batch} × {tokens} tokens divide a weight's elements: choose another number")
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast-bf16" else nullcontext()
    with (
        warnings.catch_warnings(),
        backend.forced("triton"),
        torch.set_grad_enabled(training),
        counting(rows, execute) as counts,
    ):
        # A fallback to the stock operators would hide a kernel from the table.
        warnings.filterwarnings("error", message="deit_fast.*stock PyTorch operators")
        with autocast:
            y = block(x.requires_grad_(training))
        if training:
            y.backward(grad)
    return counts


def summed(calls: list[CountedCall], kind: str) -> Moved:
    """kind: "tokens" or "weights"."""
    moved = [getattr(call, kind) for call in calls]
    return Moved(**{name: sum(getattr(m, name) for m in moved) for name in ("boundary", "once", "again", "between")})


def promised(training: bool, precision: str) -> int:
    return (PROMISED_TRAINING if training else PROMISED_INFERENCE)[precision]


def problems(counts: Counts, token_bytes: int, promise: int) -> list[str]:
    """What is not as it should be. token_bytes: of one D byte a token, over all tokens."""
    found = [f"not written exactly once: {what}" for what in counts.not_written_once]
    total = summed(counts.calls, "tokens").total / token_bytes
    if total > ALLOWED * promise:
        found.append(f"the launches move {total:.1f} D bytes a token, more than {ALLOWED} × {promise}")
    for call in counts.calls:
        if abs(call.tokens.once - call.tokens.boundary) > TOLERANCE * call.tokens.boundary:
            found.append(
                f"{call.operator} has {call.tokens.boundary} bytes at its boundary, its launches touch "
                f"{call.tokens.once} of them"
            )
        for launch in call.launches:
            reasons = explanations(launch)
            for access in launch.accesses:
                if reasons is None or not explained(access, reasons[access.name]):
                    found.append(
                        f"{call.operator}, {launch.kernel}: {access.loaded} bytes loaded of {access.name}'s "
                        f"{access.distinct_loaded}, {access.stored} stored, is not what its tiling explains"
                    )
    return found


def explained(access: Access, reason: Explanation) -> bool:
    times = reason[0]
    # Scratch in an output's place: what is stored, loaded from there and overwritten.
    scratch = access.loaded if access.distinct_stored else 0
    return abs(
        access.loaded - times * access.distinct_loaded
    ) <= TOLERANCE * times * access.distinct_loaded and access.stored - access.distinct_stored in (0, scratch)


def launch_rows(launch: CountedLaunch) -> list[str]:
    reasons = explanations(launch) or {}
    rows, kernel = [], launch.kernel
    for access in launch.accesses:
        times, words = reasons.get(access.name, (float("nan"), "?"))
        loaded = stored = rereads = reason = ""
        if access.distinct_loaded:
            loaded = f"{access.distinct_loaded} | {access.loaded}"
            rereads = f"{access.loaded / access.distinct_loaded:.2f}"
            reason = f"{times:.2f}: {words}"
        if access.distinct_stored:
            stored = f"{access.distinct_stored} | {access.stored}"
        kind = str(access.dtype).removeprefix("torch.")
        shape = "×".join(map(str, access.shape))
        rows.append(
            f"| {kernel} | {access.name} | {shape} {kind} | {loaded or ' | '} | {rereads} | {reason} "
            f"| {stored or ' | '} |"
        )
        kernel = ""
    return rows


def launches_markdown(calls: list[CountedCall]) -> str:
    lines = [
        "| kernel | tensor | shape | loaded, distinct B | loaded B | × | explained | stored, distinct B | stored B |",
        "|---|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for call in calls:
        if call.launches:
            lines.append(f"| **{call.operator}** | | | | | | | | |")
        for launch in call.launches:
            lines += launch_rows(launch)
    return "\n".join(lines)


def operators_markdown(calls: list[CountedCall], token_bytes: int) -> str:
    lines = ["| operator | launches | boundary | once | again | between | sum |", "|---|---:|---:|---:|---:|---:|---:|"]
    rows = [(" + ".join((call.operator, *call.stock)), len(call.launches), call.tokens) for call in calls]
    rows.append(("**block**", sum(launches for _, launches, _ in rows), summed(calls, "tokens")))
    for operator, launches, m in rows:
        figures = (each / token_bytes for each in (m.boundary, m.once, m.again, m.between, m.total))
        lines.append(f"| {operator} | {launches} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    arguments = parser.parse_args()
    if arguments.batch < 1:
        raise SystemExit(f"--batch must be at least 1, got {arguments.batch}")
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is imported, which it has been.
        command = [sys.executable, "-m", "evidence.memory", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode)
    from tests.support import bf16_interpreter, quick_interpreter

    bf16_interpreter.install()
    quick_interpreter.install()
    torch.manual_seed(0)
    raise SystemExit(report(arguments.size, arguments.batch, arguments.training, arguments.precision))


def report(size: str, batch: int, training: bool, precision: str) -> int:
    """Prints it; returns whether anything is not as it should be."""
    width, heads = SIZES[size]
    options = {"training": training, "precision": precision}
    counts = count_block(width, heads, TOKENS, batch, **options)
    token_bytes = batch * TOKENS * width
    block = summed(counts.calls, "tokens")
    promise = promised(training, precision)
    print(
        f"One block of DeiT-{size} (width {width}, {heads} heads), {'training' if training else 'inference'} in "
        f"{precision}, batch {batch}, {TOKENS} tokens: counted in Triton's interpreter, not measured on a GPU.\n\n"
        f"Launches\n\n{launches_markdown(counts.calls)}\n\n"
        f"Operators, D bytes a token\n\n{operators_markdown(counts.calls, token_bytes)}\n\n"
        f"The launches move {block.total / token_bytes:.1f} D bytes a token; promised: {promise} "
        f"(ratio {block.total / token_bytes / promise:.3f}); at the operators' boundaries: "
        f"{block.boundary / token_bytes:.1f}."
    )
    at_scale = count_block(width, heads, TOKENS, TRAINING_BATCH, execute=False, **options)
    tokens, weights = summed(at_scale.calls, "tokens"), summed(at_scale.calls, "weights")
    parts = (tokens.total, weights.total - weights.between, weights.between)
    grown, fixed, partial = (part / (TRAINING_BATCH * TOKENS * width) for part in parts)
    print(
        f"At batch {TRAINING_BATCH}: {grown:.1f}, and {fixed:.1f} of weights and their gradients, {partial:.1f} of "
        f"partial sums of these: {grown + fixed + partial:.1f} (ratio {(grown + fixed + partial) / promise:.3f})."
    )
    found = problems(counts, token_bytes, promise)
    print("\n".join(f"FAILED {what}" for what in found) or "Every element that the kernels write is written once.")
    return bool(found)


if __name__ == "__main__":
    main()
