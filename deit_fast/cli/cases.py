"""The arguments by which `deit-fast bench` and `deit-fast tune` are told what to run, and what they come to."""

import argparse
from collections.abc import Collection, Iterable
from dataclasses import replace

from deit_fast.benchmark.contenders import ModelCase, recipe_drop_path

MODELS = ("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224")
PRECISIONS = ("float32", "bfloat16", "float16")
MODEL_SUITES = ("model", "train")


def add_arguments(parser: argparse.ArgumentParser, dtype: str = "float32", batch: str = "1,8,16") -> None:
    """Declare what `cases` reads, but for the suites."""
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAMES", help="of timm; default: %(default)s")
    parser.add_argument("--batch", default=batch, metavar="SIZES", help="default: %(default)s")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument(
        "--dtype", default=dtype, metavar="TYPES", help=f"of the model: {', '.join(PRECISIONS)}; default: %(default)s"
    )
    parser.add_argument("--amp", default="", metavar="TYPES", help="autocast of a float32 model: bfloat16, float16")
    parser.add_argument("--drop-path", metavar="RATES", help="in training; default: that of the recipe")


def cases(args: argparse.Namespace, suites: Iterable[str]) -> list[ModelCase]:
    """Of the suites that run models.

    Raises:
        ValueError: an argument that nothing fits.
    """
    import timm

    models = choices("--models", args.models, timm.list_models())
    dtypes = choices("--dtype", args.dtype, PRECISIONS)
    amps = choices("--amp", args.amp, PRECISIONS[1:]) if args.amp else []
    batches = [int(size) if size.isdigit() else 0 for size in args.batch.split(",")]
    if min(batches) < 1:
        raise ValueError(f"--batch must be sizes of at least 1, separated by ',', got {args.batch}")
    rates = None if args.drop_path is None else _rates(args.drop_path)
    found = []
    for model in models:
        for dtype, amp in [*((dtype, None) for dtype in dtypes), *(("float32", amp) for amp in amps)]:
            for batch in batches:
                case = ModelCase(model, batch, args.img_size, dtype, amp)
                if "model" in suites:
                    found.append(case)
                # Nobody trains in float16 alone: small updates would vanish in its weights.
                if "train" in suites and dtype != "float16":
                    for rate in rates or [recipe_drop_path(model)]:
                        found.append(replace(case, training=True, drop_path=rate))
    return found


def _rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"--drop-path must be rates in [0, 1), separated by ',', got {text}")
    return rates


def choices(option: str, text: str, known: Collection[str], separator: str = ",") -> list[str]:
    """
    Raises:
        ValueError: a name that is not among `known`, or none.
    """
    names = [name.strip() for name in text.split(separator) if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        listed = "; ".join(known) if len(known) < 20 else "timm.list_models() has them"
        raise ValueError(f"{option}: unknown {', '.join(unknown) or '(none given)'}; known: {listed}")
    return names
