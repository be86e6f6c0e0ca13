"""`deit-fast predict`: the most likely classes of images."""

import argparse
import json
import sys
from typing import Any

import torch

from deit_fast._extras import require
from deit_fast.cli.errors import UserError, user_input
from deit_fast.data import load_image
from deit_fast.data.evaluation import image_processor
from deit_fast.data.labels import default_labels, describe_checkpoint, read_labels, top_classes
from deit_fast.models import create_model, load_model

BATCH_SIZE = 32
DEFAULT_MODEL = "deit_small_distilled_patch16_224"


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser("predict", help="print the most likely classes of images")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file")
    parser.add_argument(
        "--model", metavar="NAME", help=f"default: what the checkpoint holds, without one {DEFAULT_MODEL}"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help=".safetensors, .pth, or a folder of transformers, timm or `train`; without one the weights are random",
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="class names: a text file with one a line, or a JSON list or dict"
    )
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one, else cpu")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and read all input, then predict and print."""
    if not args.json:
        with user_input():
            require("rich", extra="cli")
    device = find_device(args.device)
    with user_input():
        images = [load_image(path) for path in args.images]
        labels = read_labels(args.labels) if args.labels else None
        num_classes, folder_labels = describe_checkpoint(args.checkpoint) if args.checkpoint else (None, None)
        if num_classes is None:
            num_classes = len(labels) if labels else 1000
        labels = labels or folder_labels or default_labels(num_classes, trained=bool(args.checkpoint))
        if len(labels) != num_classes:
            raise ValueError(f"{args.labels} has {len(labels)} labels, the model {num_classes} classes")
        if not 1 <= args.topk <= num_classes:
            raise ValueError(f"--topk is {args.topk}; expected 1 to {num_classes}, the number of classes")
        name = args.model
        if name is None and args.checkpoint:
            model = load_model(args.checkpoint, device=device).eval()
        else:
            name = name or DEFAULT_MODEL
            model = create_model(name, num_classes=num_classes, checkpoint=args.checkpoint, device=device).eval()
        processor = image_processor(args.checkpoint, model.config.img_size)
    if args.checkpoint is None:
        print(
            f"deit-fast: no --checkpoint: the weights of {name} are random, and the predictions mean nothing",
            file=sys.stderr,
        )

    probabilities = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH_SIZE):
            pixels = processor(images[start : start + BATCH_SIZE], return_tensors="pt").pixel_values
            probabilities.append(model(pixels.to(device)).softmax(-1).cpu())
    results = [
        {"image": path, "predictions": top_classes(row, labels, args.topk)}
        for path, row in zip(args.images, torch.cat(probabilities), strict=True)
    ]
    if args.json:
        header = {"model": name, "checkpoint": args.checkpoint, "device": str(device)}
        print(json.dumps({**header, "images": results}, indent=2, ensure_ascii=False))
    else:
        print_tables(results, random=args.checkpoint is None)
    return 0


def find_device(name: str | None) -> torch.device:
    """The device called `name`, which must work, as the current one; None: a GPU where there is one.

    Raises:
        UserError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}") from error
    if device.type == "cuda":
        # Events, graphs and other people's kernels are put on the current one's stream.
        torch.cuda.set_device(device)
    return device


def print_tables(results: list[dict[str, Any]], random: bool) -> None:
    """One table an image."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # plain: a file name or a label may hold what rich takes for markup

    console = Console()
    for result in results:
        title = result["image"] + (" (random weights)" if random else "")
        table = Table(title=Text(title, style="italic"), title_justify="left")
        table.add_column("class", justify="right", min_width=5)
        table.add_column("label", no_wrap=True)
        table.add_column("probability", justify="right", min_width=11)
        for prediction in result["predictions"]:
            percent = f"{100 * prediction['probability']:.2f} %"
            table.add_row(str(prediction["index"]), Text(prediction["label"]), percent)
        console.print(table)
