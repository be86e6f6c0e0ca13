"""Compiles every launch of DeiT's inference and training ahead of time and prints what each takes of the GPU.

    python -m bench.kernels [--targets sm_80,sm_90,…] [--libraries timm,deit_fast] [--models tiny,small,base]
                            [--suites inference,training] [--precisions bf16,autocast-bf16,fp16,fp32]
                            [--batch 32] [--json FILE]

No GPU is needed and none is measured: the launches are recorded from the running models through a stand-in
for Triton's driver, each on one block plus patch embedding, last norm and heads, cast to a dtype or under
autocast. Training is forward and backward, down to the image's gradient, and the distillation loss; under autocast,
as recipes train, also a block with LayerScale and drop path. By default that is what differs most; 'all' is the rest,
for --targets and --precisions.

Exits with 1 if a launch does not compile, asks for more shared memory than the target has, or has a 16-bit dot
without tensor-core instructions.
"""

import argparse
import json
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.models import LIBRARIES, SIZES, TOKENS, build, choices, images
from bench.resources import resources
from bench.standin_driver import Launch, recording
from bench.targets import TARGETS

# The dtype of the dots, and whether the model is float32 and under autocast, or cast as a whole.
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "autocast-bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
    "autocast-fp16": (torch.float16, True),
    "fp32": (torch.float32, False),
}
# Under autocast it is float32 tensors beside 16 bits that make the difference, not which 16 bits.
DEFAULT_PRECISIONS = "bf16,autocast-bf16,fp16,fp32"
SUITES = ("inference", "training")
CLASSES = 1000
DEFAULT_TARGETS = "sm_80,sm_90,sm_100,sm_120,gfx942"
WORKERS = 2
WORST = 5
# Bytes a thread stores at once: 16 is a whole vector; AMD's matrix cores leave 8 side by side. Less is scattered.
SCATTERED = 8


def compile_for(
    target: str, size: str, libraries: list[str], suites: list[str], precisions: list[str], batch: int
) -> dict[str, dict]:
    """Every distinct launch on one target, as table rows by key. Runs in a process of its own."""
    from deit_fast.ops import backend

    torch.set_num_threads(1)
    rows: dict[str, dict] = {}
    with backend.forced("triton"), recording(TARGETS[target]) as launches, warnings.catch_warnings():
        # A fallback to the stock operators would hide a kernel from the table.
        warnings.filterwarnings("error", message="deit_fast.*stock PyTorch operators")
        for name, precision, run in _runs(size, libraries, suites, precisions, batch):
            launches.clear()
            run()
            for launch in launches:
                row = rows.get(launch.key) or rows.setdefault(launch.key, _row(launch, precision))
                row["models"] = sorted({*row["models"], name})
    return rows


def _runs(
    size: str, libraries: list[str], suites: list[str], precisions: list[str], batch: int
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """What is run: its name, its precision, and a function without arguments."""
    import deit_fast
    from deit_fast.nn import Block

    models = {f"{library} {size}": build(library, size, depth=1) for library in libraries}
    for name, model in models.items():
        if not name.startswith("deit_fast"):
            deit_fast.swap(model)
    for precision in precisions:
        dtype, autocast = PRECISIONS[precision]
        for name, model in models.items():
            pixels = images(batch, torch.float32)
            if "inference" in suites:
                yield name, precision, partial(_infer, model, pixels, dtype, autocast)
            # Nobody trains in float16 alone: small updates would vanish in its weights.
            if "training" in suites and precision != "fp16":
                yield name, precision, partial(_train, model, pixels, dtype, autocast)
        if "training" in suites and autocast:
            width, heads = SIZES[size]
            block = Block(width, heads, qkv_bias=True, init_values=1e-5, drop_path=0.1)
            yield f"block {size}", precision, partial(_train, block, torch.zeros(batch, TOKENS, width), dtype, autocast)
        if "training" in suites:
            yield "distillation", precision, partial(_train_loss, dtype, batch)


def _infer(model: nn.Module, inputs: Tensor, dtype: torch.dtype, autocast: bool) -> None:
    model.eval().to(torch.float32 if autocast else dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        model(inputs if autocast else inputs.to(dtype))


def _train(model: nn.Module, inputs: Tensor, dtype: torch.dtype, autocast: bool) -> None:
    model.train().to(torch.float32 if autocast else dtype)
    inputs = (inputs if autocast else inputs.to(dtype)).detach().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        outputs = model(inputs)
    logits = getattr(outputs, "logits", outputs)
    # Whatever their values are: no kernel has run.
    sum(each.sum() for each in (logits if isinstance(logits, tuple) else [logits])).backward()


def _train_loss(dtype: torch.dtype, batch: int) -> None:
    from deit_fast.ops.loss import distillation_loss

    heads = [torch.zeros(batch, CLASSES, dtype=dtype, requires_grad=True) for _ in range(2)]
    teacher, mixed = torch.zeros(batch, CLASSES), torch.full((batch, CLASSES), 1 / CLASSES)
    for kind in ("hard", "soft"):
        for targets in (torch.zeros(batch, dtype=torch.int64), mixed):
            distillation_loss(*heads, targets, teacher, kind, 0.5, 3.0, label_smoothing=0.1).backward()


def _row(launch: Launch, precision: str) -> dict:
    row = {
        "target": launch.target.name,
        "kernel": launch.kernel,
        "precision": precision,
        "models": [],
        "error": None if launch.error is None else _innermost(launch.error),
    }
    if launch.error is not None:
        return row
    found = resources(launch.compiled)
    return row | {
        "grid": launch.grid,
        "tensors": {
            name: f"{'×'.join(map(str, shape))} {str(kind).removeprefix('torch.')}"
            for name, (shape, kind) in launch.tensors.items()
        },
        "constexprs": {name: str(value) for name, value in launch.constexprs.items()},
        "signature": launch.signature,
        "warps": launch.compiled.metadata.num_warps,
        "stages": launch.compiled.metadata.num_stages,
        "registers": found.registers,
        "registers_limit": launch.target.registers,
        "spilled": found.spilled,
        "shared_memory": found.shared_memory,
        "shared_memory_limit": launch.target.shared_memory,
        "dots": found.dots,
        "scalar_dots": found.scalar_dots,
        "tensor_core": found.tensor_core,
        "widest_store": found.widest_store,
    }


def _innermost(error: BaseException) -> str:
    # The compiler wraps an error once for every function it was in.
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def problem(row: dict) -> str | None:
    """What keeps this launch from being shipped, or None. Spills are the table's business."""
    if row["error"]:
        return f"does not compile: {row['error']}"
    if row["shared_memory"] > row["shared_memory_limit"]:
        return f"{row['shared_memory']} bytes of shared memory where {row['shared_memory_limit']} are allowed"
    if row["scalar_dots"] or (row["dots"] and not row["tensor_core"] and row["precision"] != "fp32"):
        return "a 16-bit dot without tensor-core instructions"
    return None


def markdown(rows: Iterable[dict]) -> str:
    lines = [
        "| target | kernel | precision | shape | blocks | warps | stages "
        "| registers | spilled B | shared B (limit) | widest store B | tensor cores |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        about = f"| {row['target']} | {row['kernel']} | {row['precision']} "
        if row["error"]:
            lines.append(about + "| " * 8 + "| does not compile |")
            continue
        tensors = {name: text.split()[0] for name, text in row["tensors"].items() if "×" in text}
        shape = ", ".join(f"{name.removesuffix('_ptr')} {text}" for name, text in list(tensors.items())[:3])
        blocks = ", ".join(f"{name} {v}" for name, v in row["constexprs"].items() if "BLOCK" in name)
        cores = ", ".join(f"{kind} {count}" for kind, count in sorted(row["tensor_core"].items())) or "–"
        lines.append(
            f"{about}| {shape} | {blocks} | {row['warps']} | {row['stages']} | {row['registers']} "
            f"| {row['spilled']} | {row['shared_memory']} ({row['shared_memory_limit']}) "
            f"| {row['widest_store']} | {cores} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """The worst rows, and how many spill."""
    compiled = [row for row in rows if not row["error"]]
    spilling = sorted((row for row in compiled if row["spilled"]), key=lambda row: -row["spilled"])
    crowded = sorted(compiled, key=lambda row: -row["shared_memory"] / row["shared_memory_limit"])
    wide = sorted(compiled, key=lambda row: -row["registers"] / row["registers_limit"])
    scattered = [row for row in compiled if row["widest_store"] < SCATTERED]
    parts = [
        f"{len(rows)} distinct launches; {len(spilling)} spill registers; "
        f"{len(scattered)} store less than {SCATTERED} bytes at once."
    ]
    for title, worst in (
        ("Most spilled", spilling),
        ("Narrow stores", scattered),
        ("Most shared memory of what is allowed", crowded),
        ("Most registers of what is allowed", wide),
    ):
        if worst:
            parts.append(f"{title}:\n\n{markdown(worst[:WORST])}")
    return "\n\n".join(parts)


def _all(text: str, known: Iterable[str]) -> str:
    return ",".join(known) if text == "all" else text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", default=DEFAULT_TARGETS, help=f"of {', '.join(TARGETS)}, or 'all'")
    parser.add_argument("--libraries", default="timm,transformers,deit_fast")
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--precisions", default=DEFAULT_PRECISIONS, help=f"of {', '.join(PRECISIONS)}, or 'all'")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write every figure to this file as well")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        raise SystemExit(f"--batch must be at least 1, got {arguments.batch}")
    targets = choices(_all(arguments.targets, TARGETS), TARGETS, "target")
    sizes = choices(arguments.models, SIZES, "model")
    task = (
        choices(arguments.libraries, LIBRARIES, "library"),
        choices(arguments.suites, SUITES, "suite"),
        choices(_all(arguments.precisions, PRECISIONS), PRECISIONS, "precision"),
        arguments.batch,
    )

    # A fresh process each: whatever the product remembers of its device is forgotten with it.
    spawn = multiprocessing.get_context("spawn")
    merged: dict[tuple[str, str], dict] = {}
    with ProcessPoolExecutor(WORKERS, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = {
            (target, size): pool.submit(compile_for, target, size, *task) for target in targets for size in sizes
        }
        for (target, _), future in futures.items():
            for key, row in future.result().items():
                known = merged.setdefault((target, key), row)
                known["models"] = sorted({*known["models"], *row["models"]})

    rows = sorted(merged.values(), key=lambda row: (row["kernel"], row["precision"], targets.index(row["target"])))
    print(markdown(rows), summary(rows), sep="\n\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    problems = [(row, problem(row)) for row in rows if problem(row)]
    for row, what in problems:
        print(f"\nFAILED {row['target']} {row['kernel']} {row['precision']} {', '.join(row['models'])}: {what}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
