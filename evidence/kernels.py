"""Compiles every launch of DeiT's inference and training ahead of time and says what each takes of the GPU.

    python -m evidence.kernels [--targets sm_80,sm_90,…] [--models tiny,small,…] [--suites inference,training]
                            [--precisions bf16,autocast-bf16,…] [--batch 64] [--out FOLDER] [--against FILE]
                            [--reuse FILE]

No GPU is needed and none is measured: the launches are recorded from the running models through a stand-in
for Triton's driver, each on a few blocks plus patch embedding, last norm and heads, cast to a dtype or under
autocast. Training is forward and backward, down to the image's gradient, with and without drop path, and the
distillation loss. With them comes what `deit-fast tune` may put around the vendor's GEMM. Launches of one binary are
compiled once.

--out writes kernels.json, a row a launch, and kernels.md, the worst of each kernel on each target; what the folder has
of other targets stays. --against compares with an earlier kernels.json of the same Triton. A launch's floor is what it
takes of the target's GPU at least, for the grid in its row (`evidence.clocks`); rows of the same grid are compared.
--reuse takes the rows of an earlier kernels.json of the same Triton whose binaries, grids and tensors are the same, and
compiles the others. Their figures are the earlier code's: it is no use after a change in how they are found.

Exits with 1 if a launch does not compile, spills registers, asks for more shared memory than the target has, or has
a dot without tensor-core instructions or accesses that could be wider, or if --against lacks it or has it take less, a
floor among the rest.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from deit_fast.check.standin_driver import RecordedLaunch, compile_launch
from deit_fast.check.targets import TARGETS, Target
from deit_fast.kernels.launching.hardware import NO_FLOAT32_PRODUCTS
from evidence.clocks.gpus import GPUS
from evidence.clocks.launch import Sizes, count, floor
from evidence.clocks.source import Uncounted
from evidence.launches import MODELS, PRECISIONS, SUITES, recorded
from evidence.models import choices
from evidence.resources import resources

# Under autocast float16's launches are bfloat16's in another type.
DEFAULT_PRECISIONS = "bf16,autocast-bf16,fp16,fp32"
WORKERS = 2
# Fresh processes: whatever the product remembers of its device is forgotten with them.
SPAWN = multiprocessing.get_context("spawn")
# Its processes would else keep the memory of all they compiled. (max_tasks_per_child can wait for ever: in Python 3.11
# a pool whose processes end at one time starts no other.)
COMPILED_BY_A_POOL = 200
_SHARE_AS_BEFORE = 0.01
_FLOOR_AS_BEFORE = 1.01
# NVIDIA's share of bytes in accesses of 128 bits that a kernel must reach, and what can't. (AMD's is reported alone.)
WIDE = 0.9
_PATCHES = "rows of patches 14 pixels wide (DeiT III-H) are 28 bytes"
_VECTORS = "what it reads and writes are mostly vectors, or one number a row"
NARROW = {
    "column_sums_kernel": _VECTORS,
    "distillation_loss_kernel": "one number for each of a row's classes, a row a program",
    "finish_layer_norm_linear_kernel": _VECTORS,
    "finish_linear_kernel": _VECTORS,
    "image_gradient_kernel": _PATCHES,
    "keep_samples_kernel": _VECTORS,
    "key_gradient_kernel": "heads of 80 (DeiT III-H) end in a tile 16 wide",
    "layer_norm_backward_kernel": "a program's few rows weigh little beside γ",
    "layer_norm_kernel": "a program's few rows weigh little beside γ and β",
    "normalise_pixels_kernel": "rectangles that random erasing fills lie anywhere",
    "patch_embed_kernel": _PATCHES,
    "patch_weight_gradient_kernel": _PATCHES,
    "persistent_linear_kernel": "its operands come by a copy engine; the rest is a vector in most",
    "query_gradient_kernel": "heads of 80 (DeiT III-H) end in a tile 16 wide",
    "readout_backward_kernel": "tiles 16 columns wide at the widths that are no multiple of its widest",
    "sum_partials_kernel": _VECTORS,
    "sum_splits_kernel": _VECTORS,
    "token_gradients_kernel": _VECTORS,
}


def each_alone(function: Callable, calls: Sequence[tuple]) -> list:
    """What `function` returns for each of `calls`, every one in a process of its own, WORKERS at a time."""

    def alone(arguments: tuple) -> object:
        with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
            return pool.submit(function, *arguments).result()

    with ThreadPoolExecutor(WORKERS) as threads:
        return list(threads.map(alone, calls))


def launches_on(target: str, *what) -> tuple[dict[str, dict], list[str]]:
    """The rows of one target, by id, before compilation; what the stock operators ran. In a process of its own."""
    from deit_fast.ops import backend

    rows: dict[str, dict] = {}
    for model, precision, launch in recorded(TARGETS[target], *what):
        identity = hashlib.sha256("".join(launch.key).encode()).hexdigest()[:16]
        row = rows.setdefault(identity, _row(launch, precision, identity))
        row["models"] = sorted({*row["models"], model})
    return rows, sorted(backend.said)


def _row(launch: RecordedLaunch, precision: str, identity: str) -> dict:
    return {
        "id": identity,
        "target": launch.target.name,
        "kernel": launch.kernel,
        "precision": precision,
        "models": [],
        "error": None if launch.error is None else _innermost(launch.error),
        "grid": launch.grid,
        "tensors": {
            name: f"{'×'.join(map(str, shape))} {str(kind).removeprefix('torch.')}"
            for name, (shape, kind) in launch.tensors.items()
        },
        "constexprs": {name: str(value) for name, value in launch.constexprs.items()},
        "launch": (launch.function, launch.specialization, Sizes.of(launch)),
    }


def compiled(row: dict) -> dict:
    """`row` with what its launch takes. Runs in a worker."""
    target = TARGETS[row["target"]]
    *launch, sizes = row.pop("launch")
    if row["error"]:
        return row
    try:
        kernel = compile_launch(target, *launch)
    except Exception as error:  # whatever the compiler raises, the other rows are still wanted
        return row | {"error": _innermost(error)}
    taken = resources(kernel, target)
    return row | {
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        **asdict(taken),
        **counted(kernel, sizes, target, taken.programs),
    }


def counted(kernel: CompiledKernel, sizes: Sizes, target: Target, programs: int) -> dict:
    """floor: µs of the target's GPU, counted, or None; floor_of: what bounds it, or why there is none."""
    if target.name not in GPUS:
        return {"floor": None, "floor_of": "no data sheet of its GPU"}
    gpu = GPUS[target.name]
    try:
        lowest, bound = floor(count(kernel, sizes, gpu, programs), gpu)
    except Uncounted as reason:
        return {"floor": None, "floor_of": str(reason)}
    return {"floor": float(f"{lowest:.4g}"), "floor_of": bound}


def _innermost(error: BaseException) -> str:
    # The compiler wraps an error once for every function it was in.
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def problem(row: dict) -> str | None:
    """What keeps this launch from being shipped, or None."""
    target = TARGETS[row["target"]]
    if row["error"]:
        return f"does not compile: {row['error']}"
    if row["spilled"]:
        return f"{row['spilled']} bytes of registers spilled"
    if row["shared_memory"] > target.shared_memory:
        return f"{row['shared_memory']} bytes of shared memory where {target.shared_memory} are allowed"
    if row["scalar_dots"] or (row["dots"] and not row["tensor_core"]):
        return "a dot without tensor-core instructions"
    if target.gpu.backend == "cuda" and row["kernel"] not in NARROW:
        for share, what in ((row["wide_loads"], "loads"), (row["wide_stores"], "stores")):
            if share is not None and share < WIDE:
                return f"{share:.0%} of {what} 128 bits wide"
    return None


def regression(row: dict, before: dict | None) -> str | None:
    """What this launch takes that it did not take before, or None."""
    if before is None:
        return "a launch that --against does not have"
    if row["error"] or before["error"]:
        return None
    for name, what in (("spilled", "bytes spilled"), ("shared_memory", "bytes of shared memory")):
        if row[name] > before[name]:
            return f"{row[name]} {what}, before {before[name]}"
    if row["programs"] < before["programs"]:
        return f"{row['programs']} programs a multiprocessor, before {before['programs']}"
    if lost := sorted(before["tensor_core"].keys() - row["tensor_core"].keys()):
        return f"no {', '.join(lost)} as before"
    for name, what in (("wide_loads", "loads"), ("wide_stores", "stores")):
        if None not in (row[name], before[name]) and row[name] < before[name] - _SHARE_AS_BEFORE:
            return f"{row[name]:.0%} of {what} 128 bits wide, before {before[name]:.0%}"
    if row.get("floor") is None and before.get("floor") is not None:
        return f"no floor as before: {row['floor_of']}"
    if floors_compare(row, before) and row["floor"] > _FLOOR_AS_BEFORE * before["floor"]:
        return f"a floor of {row['floor']} µs ({row['floor_of']}), before {before['floor']}"
    return None


def floors_compare(row: dict, before: dict) -> bool:
    """Whether both have a floor, and of one grid: rows of a binary are of the first of its launches."""
    return _same_launch(row, before) and None not in (row.get("floor"), before.get("floor"))


def _same_launch(row: dict, before: dict) -> bool:
    return list(row.get("grid", ())) == list(before.get("grid", ())) and row["tensors"] == before["tensors"]


def markdown(rows: list[dict]) -> str:
    """A line for each kernel on each target: the worst of its launches."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["kernel"], row["target"]].append(row)
    lines = [
        "| kernel | target | launches | warps | stages | registers (of) | spilled B | shared B (of) | programs "
        "| tensor cores | loads 128 bits wide | stores | code B | floor µs |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for (kernel, name), group in sorted(groups.items(), key=lambda item: (item[0][0], list(TARGETS).index(item[0][1]))):
        target = TARGETS[name]
        good = [row for row in group if not row["error"]]
        if not good:
            lines.append(f"| {kernel} | {name} | {len(group)} | does not compile |" + " |" * 10)
            continue
        cores = sorted({kind for row in good for kind in row["tensor_core"]})
        lines.append(
            f"| {kernel} | {name} | {len(group)} | {_range(good, 'warps')} | {_range(good, 'stages')} "
            f"| {max(row['registers'] for row in good)} ({target.registers}) "
            f"| {max(row['spilled'] for row in good)} "
            f"| {max(row['shared_memory'] for row in good)} ({target.shared_memory}) "
            f"| {_range(good, 'programs')} | {', '.join(cores) or '–'} "
            f"| {_least(good, 'wide_loads')} | {_least(good, 'wide_stores')} | {max(row['code'] for row in good)} "
            f"| {_floors(good)} |"
        )
    return "\n".join(lines)


def _range(rows: Iterable[dict], name: str) -> str:
    values = [row[name] for row in rows]
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _least(rows: Iterable[dict], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{100 * min(values):.0f} %" if values else "–"


def _floors(rows: Iterable[dict]) -> str:
    values = [row["floor"] for row in rows if row.get("floor") is not None]
    return f"{min(values):.3g}–{max(values):.3g}" if values else "–"


def summary(rows: list[dict]) -> str:
    problems = [row for row in rows if problem(row)]
    full = [row for row in rows if not row["error"] and row["programs"] < 2]
    uncounted = [row for row in rows if not row["error"] and row.get("floor") is None]
    return (
        f"{len(rows)} launches on {len({row['target'] for row in rows})} targets, "
        f"{len({row['kernel'] for row in rows})} kernels; {len(problems)} with a problem; "
        f"{len(full)} of which a multiprocessor holds one program only; {len(uncounted)} without a floor."
    )


def page(rows: list[dict], left_to_stock: dict[str, list[str]]) -> str:
    targets: dict[str, list[str]] = defaultdict(list)
    for target, said in left_to_stock.items():
        for message in said:
            targets[message].append(target)
    for name in NO_FLOAT32_PRODUCTS & left_to_stock.keys():
        targets["float32 products, for which it has no matrix instructions"].append(name)
    left = "".join(f"- {', '.join(names)}: {message}\n" for message, names in sorted(targets.items()))
    return (
        "# What the kernels take of each GPU\n\n"
        f"Compiled ahead of time with Triton {triton.__version__}, none of it run, by `make kernels-all`. "
        f"{summary(rows)} `kernels.json` has every launch; here are the worst figures of each kernel's.\n\n"
        "Registers are a thread's, shared memory a program's; 'programs' is how many a multiprocessor (on RDNA a "
        "workgroup processor) holds at once. Loads and stores: the share of a program's bytes in accesses of 128 bits, "
        "vectors of biases, statistics and indices included; a loop's count once. Floor: µs that a launch takes at "
        "least, counted in its machine code for a GPU of its target and the grid in its row; "
        "`python -m evidence.clocks --help` says how.\n\n"
        + markdown(rows)
        + f"\n\nOn NVIDIA GPUs less than {WIDE:.0%} of these kernels' loads or stores may be 128 bits wide:\n\n"
        + "".join(f"- {kernel}: {reason}\n" for kernel, reason in NARROW.items())
        + _no_floors(rows)
        + (f"\nNo kernels; the stock operators run, with one warning each:\n\n{left}" if left else "")
    )


def _no_floors(rows: list[dict]) -> str:
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if "floor" in row and row["floor"] is None:
            reasons[row["floor_of"]].append(f"{row['kernel']} on {row['target']}")
    lines = (f"- {reason}: {', '.join(sorted(set(names)))}\n" for reason, names in sorted(reasons.items()))
    return f"\nNo floor:\n\n{''.join(lines)}" if reasons else ""


def write(folder: Path, rows: list[dict], left_to_stock: dict[str, list[str]]) -> None:
    """Beside what `folder` has of other targets from the same Triton."""
    file = folder / "kernels.json"
    if file.exists() and (before := json.loads(file.read_text()))["triton"] == triton.__version__:
        rows = rows + [row for row in before["rows"] if row["target"] not in left_to_stock]
        left_to_stock = before["left_to_stock"] | left_to_stock
    rows = sorted(rows, key=_order)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    left = json.dumps({target: left_to_stock[target] for target in TARGETS if target in left_to_stock})
    file.write_text(f'{{"triton": "{triton.__version__}", "left_to_stock": {left}, "rows": [\n{lines}\n]}}\n')
    (folder / "kernels.md").write_text(page(rows, left_to_stock))


def _order(row: dict) -> tuple:
    return row["kernel"], list(TARGETS).index(row["target"]), row["precision"], row["id"]


def _earlier(file: Path) -> dict[tuple[str, str], dict]:
    read = json.loads(file.read_text())
    if read["triton"] != triton.__version__:
        raise SystemExit(f"{file} was made with Triton {read['triton']}, this is {triton.__version__}")
    return {(row["target"], row["id"]): row for row in read["rows"]}


def _all(text: str, known: Iterable[str]) -> str:
    return ",".join(known) if text == "all" else text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", default="all", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--models", default="all", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--suites", default="all", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--precisions", default=DEFAULT_PRECISIONS, help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder for kernels.md and kernels.json")
    parser.add_argument("--against", type=Path, help="an earlier kernels.json")
    parser.add_argument("--reuse", type=Path, help="an earlier kernels.json")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        raise SystemExit(f"--batch must be at least 1, got {arguments.batch}")
    if arguments.out and not arguments.out.is_dir():
        raise SystemExit(f"--out must be a folder that exists, got {arguments.out}")
    targets = choices(_all(arguments.targets, TARGETS), TARGETS, "target")
    what = (
        choices(_all(arguments.models, MODELS), MODELS, "model"),
        choices(_all(arguments.suites, SUITES), SUITES, "suite"),
        choices(_all(arguments.precisions, PRECISIONS), PRECISIONS, "precision"),
        arguments.batch,
    )
    before = _earlier(arguments.against) if arguments.against else {}
    reusable = _earlier(arguments.reuse) if arguments.reuse else {}

    rows, waiting, start = [], [], time.perf_counter()
    found = dict(zip(targets, each_alone(launches_on, [(target, *what) for target in targets]), strict=True))
    for row in (row for launches, _ in found.values() for row in launches.values()):
        earlier = reusable.get((row["target"], row["id"]))
        if earlier and not earlier["error"] and _same_launch(row, earlier):
            rows.append(earlier | {"models": row["models"]})
        else:
            waiting.append(row)
    reused = len(rows)
    for first in range(0, len(waiting), COMPILED_BY_A_POOL):
        with ProcessPoolExecutor(WORKERS, mp_context=SPAWN) as pool:
            rows += pool.map(compiled, waiting[first : first + COMPILED_BY_A_POOL])
        done = f"{len(rows) - reused} of {len(waiting)} compiled, {reused} reused"
        print(f"{done}, {time.perf_counter() - start:.0f} s", file=sys.stderr)

    rows.sort(key=_order)
    print(markdown(rows), summary(rows), sep="\n\n")
    if arguments.out:
        write(arguments.out, rows, {target: said for target, (_, said) in found.items()})
    failed = False
    for row in rows:
        what = problem(row)
        if before and what is None:
            what = regression(row, before.get((row["target"], row["id"])))
        if what:
            failed = True
            print(f"\nFAILED {row['target']} {row['kernel']} {row['precision']} {', '.join(row['models'])}: {what}")
    if before:
        known = [(row, before[row["target"], row["id"]]) for row in rows if (row["target"], row["id"]) in before]
        compared = sum(floors_compare(*pair) for pair in known)
        had_none = sum(earlier.get("floor") is None for _, earlier in known)
        print(f"\n{compared} floors compared; of {len(known)} rows in --against, {had_none} have no floor.")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
