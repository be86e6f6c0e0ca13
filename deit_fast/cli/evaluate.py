"""`deit-fast eval`: a model's accuracy on a folder of images."""

import argparse
import sys
from typing import Any

from deit_fast._extras import require
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.train import LIBRARIES, help_format


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    explained = "accuracy of a model on a folder of images"
    parser = commands.add_parser(
        "eval",
        help=explained,
        description=f"A{explained[1:]}.",
        usage="deit-fast eval --model NAME --data-path DIR [option ...]",
        formatter_class=help_format,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="NAME", help="timm's name, or the folder of a checkpoint")
    model.add_argument("--eval-crop-ratio", type=float, metavar="X", help="default: the model's own")
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", required=True, metavar="DIR", help="with val inside, a folder a class, or a .tar")
    data.add_argument("--data-set", default="", metavar="NAME", help="of timm's create_dataset, say hfds/NAME")
    data.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="processes that read; default: %(default)s"
    )
    computing = parser.add_argument_group("run")
    computing.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: %(default)s")
    computing.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    computing.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the loss and the share of right answers."""
    with user_input():
        for module in LIBRARIES:
            require(module, extra="train")
        from accelerate import Accelerator
        from timm.data import resolve_model_data_config

        from deit_fast.train import build
        from deit_fast.train.evaluation import evaluate
        from deit_fast.train.pixels import Normalise
        from deit_fast.train.reading import named
        from deit_fast.train.samples import eval_transform, open_val, val_loader

        accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
        val, num_classes = open_val(args.data_path, args.data_set)
        model = build.pretrained(args.model, num_classes).to(accelerator.device)
        data_config = resolve_model_data_config(model, args={"crop_pct": args.eval_crop_ratio})
        normalise = Normalise(data_config, accelerator.device, build.images_dtype_of(model, args.mixed_precision))
        mine = range(accelerator.process_index, len(val), accelerator.num_processes)
        loader = val_loader(val, eval_transform(data_config), args.batch_size, mine, args.num_workers, max_corrupt=1.0)
    try:
        found = evaluate(model, loader, normalise, accelerator)
    except OSError as error:  # there is none that can be read
        raise UserError(str(error)) from error
    corrupt = loader.gather()
    if found is not None and accelerator.is_main_process:
        print(f"loss {found.loss:.4f}, {100 * found.accuracy:.2f} % of {len(val) - len(corrupt)} images")
        if corrupt:
            print(f"Left out, since they can't be read: {len(corrupt)} images, {named(corrupt)}", file=sys.stderr)
    return 0
