"""`deit-fast train`, `finetune` and `pretrain`: a recipe on a folder of images, without a script."""

import argparse
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deit_fast._extras import require
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.progress import bar, progress_bars
from deit_fast.train import recipe as recipes

if TYPE_CHECKING:
    from rich.progress import Progress

WIDTH = 110
LIBRARIES = ("timm", "torchvision", "accelerate", "rich")


# Each command is the one loop with a recipe of its own, and the value that makes it what it is.
COMMANDS = {
    "train": ("deit", None, "train a DeiT by a recipe on a folder of images, with or without a teacher"),
    "finetune": ("finetune", "finetune", "go on from pretrained weights: new classes, larger images, a linear probe"),
    "pretrain": ("pretrain", "mask_ratio", "train without labels: fill in masked squares of the images"),
}


def help_format(prog: str) -> argparse.HelpFormatter:
    """Of a help that fits a screen."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=WIDTH)


def add_parser(commands: Any) -> None:
    """Declare the subcommands and their arguments."""
    for command in COMMANDS:
        _add_parser(commands, command)


def _add_parser(commands: Any, command: str) -> None:
    recipe, needed, explained = COMMANDS[command]
    more = "--finetune NAME|FILE " if needed == "finetune" else ""
    parser = commands.add_parser(
        command,
        help=explained,
        description=explained[0].upper() + explained[1:] + ".",
        usage=f"deit-fast {command} --data-path DIR --output-dir DIR {more}[--recipe NAME] [option ...]",
        formatter_class=help_format,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path", required=True, metavar="DIR", help="with train and val inside, a folder a class or tars"
    )
    data.add_argument("--data-set", default="", metavar="NAME", help="of timm's create_dataset, say hfds/NAME")
    data.add_argument("--nb-classes", type=int, metavar="N", help="where the data set does not say")
    data.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="processes that read; default: %(default)s"
    )
    data.add_argument(
        "--max-corrupt", type=float, default=0.01, metavar="X", help="stop if more than this share can't be read"
    )
    run = parser.add_argument_group("run")
    known = ", ".join(recipes.recipes())
    run.add_argument("--recipe", default=recipe, metavar="NAME", help=f"{known}, or a .yaml file")
    run.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    run.add_argument("--grad-accum-steps", type=int, default=1, metavar="N", help="cut each batch into N")
    run.add_argument("--memory", choices=("balanced", "low"), default="balanced", help="as of deit_fast.swap")
    run.add_argument("--no-swap", dest="swap", action="store_false", help="train the stock model, to compare with it")
    run.add_argument("--compile", action="store_true", help="with torch.compile")
    run.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", metavar="NAME", help="of timm or transformers, or the folder of a checkpoint")
    teacher.add_argument("--teacher-classes", metavar="FILE", help="its class for each of the student's")
    teacher.add_argument("--teacher-logits", metavar="DIR", help="its answers, written once, then read")
    teacher.add_argument("--teacher-compile", action="store_true", help="with torch.compile")
    files = parser.add_argument_group("files")
    files.add_argument("--output-dir", required=True, metavar="DIR", help="for checkpoints and log.jsonl")
    files.add_argument("--resume", metavar="auto|DIR", help="from the newest checkpoint there, or from that one")
    files.add_argument("--save-every", type=int, metavar="STEPS", help="beside each epoch's end")
    files.add_argument("--keep", type=int, default=2, metavar="N", help="the last N checkpoints, and the best")
    files.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    files.add_argument("--log-with", nargs="+", default=(), metavar="NAME", help="tensorboard, wandb, mlflow, ...")
    recipes.add_options(parser)
    plain = parser.format_help
    parser.format_help = lambda: plain() + _recipe_help(recipe)
    parser.set_defaults(run=run_command)


def _recipe_help(recipe: str) -> str:
    """The recipe's options with its values, a paragraph a group."""
    try:
        groups = list(recipes.explained(recipes.load(recipe)))
    except ImportError as error:
        return f"\nrecipe: {error}\n"
    lines = ["", f"recipe, with the values of {recipe} (recipes/deit.yaml explains each):"]
    for group, options in groups:
        indent = f"  {group + ':':14}"
        text = options.replace(" --", "\n--").replace(" ", "\0").replace("\n", " ")
        wrapped = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=" " * 16, break_on_hyphens=False)
        lines += [line.replace("\0", " ") for line in wrapped]
    return "\n".join(lines) + "\n"


def run_command(args: argparse.Namespace) -> int:
    """Train; 143, as for a process that SIGTERM ends, where that stopped it."""
    with user_input():
        for module in LIBRARIES:
            require(module, extra="train")
        recipe = recipes.load(args.recipe, **recipes.given(args))
        needed = COMMANDS[args.command][1]
        if needed and getattr(recipe, needed) is None:
            raise UserError(f"{args.command} needs --{needed.replace('_', '-')}")
        from deit_fast.train.run import Job, Run

        run = Run(recipe, Job(**{name: getattr(args, name) for name in Job.__dataclass_fields__}))
    from rich.console import Console

    console = Console(highlight=False, quiet=not run.accelerator.is_main_process)
    if run.step:
        console.print(f"Resumed after step {run.step} of {run.steps}.")
    try:
        with progress_bars(console) as progress:
            finished = run.train(_shown(progress))
    except (FloatingPointError, OSError) as error:
        raise UserError(str(error)) from error
    if not finished:
        console.print(f"Stopped after step {run.step} of {run.steps}; --resume auto goes on.")
        return 143
    if run.loader.corrupt:
        console.print(f"{len(run.loader.corrupt)} training images could not be read; log.jsonl names them.")
    if run.best is not None:
        score = run.best[0]
        best = f"validation loss {-score:.4f}" if recipe.masks else f"{100 * score:.2f} % of the validation images"
        folder = "best/ema" if recipe.model_ema else "best"
        console.print(f"Best: {best}, {args.output_dir}/{folder}.", soft_wrap=True)
    return 0


def _shown(progress: "Progress") -> Callable[[int, int, dict[str, Any]], None]:
    """A bar with what the last steps were, and a line for each evaluation and for corrupt images."""
    from deit_fast.train.reading import named

    update = bar(progress, "train")

    def show(step: int, steps: int, record: dict[str, Any]) -> None:
        if "corrupt" in record:
            corrupt = record["corrupt"]
            progress.console.print(f"{len(corrupt)} {record['split']} images can't be read: {named(corrupt)}")
            return
        if "loss" not in record:
            of = "EMA " if record["ema"] else ""
            accuracy = f"{100 * record['val_accuracy']:.2f} %, " if "val_accuracy" in record else ""
            progress.console.print(
                f"epoch {record['epoch'] + 1}: {of}{accuracy}validation loss {record['val_loss']:.4f}"
            )
            return
        update(
            step,
            steps,
            f"loss {record['loss']:.3f}, {record['images_per_second']:.0f} images/s, "
            f"{record['seconds_left'] / 60:.0f} min left; data {100 * record['waiting_for_data']:.0f} %, "
            f"teacher {100 * record['waiting_for_teacher']:.0f} %",
        )

    return show
