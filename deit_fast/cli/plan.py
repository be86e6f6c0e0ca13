"""`deit-fast plan`: memory, the largest batch and the days of a training, before it is started."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from deit_fast.benchmark.contenders import recipe_drop_path
from deit_fast.cli.errors import user_input
from deit_fast.models.config import DeiTConfig
from deit_fast.models.registry import get_config
from deit_fast.train import plan

_GIB, _MIB = 2**30, 2**20


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "plan",
        help="a training's memory a GPU, largest batch, and days at a throughput that you give",
        description="Nothing is measured: memory is computed from tensors' sizes, and days from a throughput that you "
        "give or a result of `deit-fast bench` holds.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="NAME", help="one of deit_fast.list_models()")
    model.add_argument("--image-size", type=int, metavar="PIXELS", help="default: the one in the name")
    model.add_argument("--distilled", action="store_true", help="with a distillation token and a second head")
    gpu = parser.add_argument_group("GPUs")
    gpu.add_argument("--gpus", type=int, default=1, metavar="N", help="default: %(default)s")
    gpu.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each")
    gpu.add_argument("--batch-size", type=int, default=256, metavar="N", help="of each; default: %(default)s")
    step = parser.add_argument_group("training step")
    step.add_argument("--precision", choices=plan.PRECISIONS, default="amp", help="amp: autocast to bfloat16 (default)")
    step.add_argument("--memory", choices=("balanced", "low"), default="balanced", help="as of deit_fast.swap")
    step.add_argument("--optimizer", choices=plan.OPTIMIZERS, default="adamw", help="default: %(default)s")
    step.add_argument("--ema", action="store_true", help="keep a moving average of the weights")
    step.add_argument("--drop-path", type=float, metavar="X", help="default: the recipe's; --bench is looked up by it")
    run = parser.add_argument_group("run")
    run.add_argument("--images", type=int, default=1_281_167, metavar="N", help="an epoch; default: ImageNet-1k's")
    run.add_argument("--epochs", type=int, default=300, metavar="N", help="default: %(default)s")
    rate = run.add_mutually_exclusive_group()
    rate.add_argument("--images-per-second", type=float, metavar="X", help="of all GPUs together, as log.jsonl has it")
    rate.add_argument("--bench", type=Path, metavar="FILE", help="results.json of deit-fast bench, of one GPU")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Print the plan; 1 where the batch does not fit."""
    with user_input():
        _refuse(args)
        config = _config(args)
        drop_path = recipe_drop_path(args.model) if args.drop_path is None else args.drop_path
        throughput = _throughput(args, config, drop_path)
    fixed = plan.fixed_memory(config, args.precision, args.optimizer, args.ema, args.gpus)
    image = plan.kept_for_backward(config, args.precision, args.memory)
    _, height, width = config.input_size
    print(
        f"Given: {args.model}{', distilled' if args.distilled else ''}: {height} x {width} pixels, {args.precision}, "
        f"memory {args.memory}, {args.gpus} x {args.batch_size} images\n"
    )
    _print_memory(fixed, image, args.batch_size)
    fits = True
    if args.gpu_memory is not None:
        most = plan.largest_batch(int(args.gpu_memory * _GIB) - sum(fixed.values()), image)
        fits = args.batch_size <= most
        too_large = "" if fits else f"; {args.batch_size} does not fit"
        print(f"Largest batch in {args.gpu_memory:g} GiB, computed, at most: {most:,} images a GPU{too_large}")
    steps = args.images // (args.batch_size * args.gpus)
    print(f"Steps, computed: {args.epochs * steps:,} ({args.epochs} epochs of {steps:,})")
    if throughput is None:
        print("Days: not known without a throughput (--images-per-second, or --bench)")
    else:
        rate, source = throughput
        days = plan.days(args.epochs * args.images, rate)
        print(f"Throughput: {rate:,.1f} images/s ({source})")
        print(f"Days, computed from it: {days:.2f}, without validation, checkpoints or waiting for data")
    return int(not fits)


def _print_memory(fixed: dict[str, int], image: int, batch_size: int) -> None:
    kept = batch_size * image
    rows = {
        **fixed,
        f"kept for backward, {batch_size} images of {image / _MIB:.2f} MiB": kept,
        "sum": sum(fixed.values()) + kept,
    }
    print("Memory a GPU, GiB, computed:")
    for what, size in rows.items():
        print(f"  {what:58} {size / _GIB:8.2f}")
    print(
        "  Not counted: workspace of kernels, loss and optimizer, a teacher, the CUDA context, fragmentation.\n"
        "  Drop path changes nothing: there is room for every sample.\n"
    )


def _refuse(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a value out of range, or two that contradict each other.
    """
    for name in ("gpus", "gpu_memory", "batch_size", "images", "epochs", "images_per_second"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.drop_path is not None and not 0 <= args.drop_path < 1:
        raise ValueError(f"--drop-path must be in [0, 1), got {args.drop_path}")
    if args.batch_size * args.gpus > args.images:
        raise ValueError(f"a step of {args.gpus} x {args.batch_size} images is more than an epoch's {args.images}")
    if args.bench is not None and args.memory == "low":
        raise ValueError("--bench measures --memory balanced; give --images-per-second for low")


def _config(args: argparse.Namespace) -> DeiTConfig:
    config = get_config(args.model)
    if args.distilled and config.distilled:
        raise ValueError(f"--distilled is given, and {args.model} is distilled already")
    size = config.img_size if args.image_size is None else args.image_size
    return replace(config, img_size=size, distilled=config.distilled or args.distilled)


def _throughput(args: argparse.Namespace, config: DeiTConfig, drop_path: float) -> tuple[float, str] | None:
    """Images a second of all GPUs, and where that is from."""
    if args.images_per_second is not None:
        return args.images_per_second, "given"
    if args.bench is None:
        return None
    from deit_fast.benchmark.results import Results

    results = Results.read(args.bench)
    found = plan.measured(results, config, args.precision, drop_path, args.batch_size)
    if found is None:
        cases = dict.fromkeys(row.case.title for row in results.rows if row.case.training)
        raise ValueError(
            f"{args.bench} has no timed step of deit_fast for this model, size, precision and drop path "
            f"{drop_path:g}; it has: {'; '.join(cases) or 'no training'}"
        )
    rate, batch = found
    device = results.environment.get("device", "an unknown device").partition("; load average")[0]
    return args.gpus * rate, (
        f"{args.gpus} x {rate:,.1f}, measured at batch {batch} without an optimizer, and taken to add up; on {device}"
    )
