"""`deit-fast demo`: stock and swapped DeiT side by side, on two real photographs and then in training."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import deit_fast
from deit_fast._extras import require
from deit_fast.cli import demo_inference
from deit_fast.cli.errors import user_input
from deit_fast.cli.predict import find_device
from deit_fast.kernels.launching import tf32

DEFAULT_OUT = "deit-fast-demo"


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its argument."""
    parser = commands.add_parser(
        "demo", help="stock and swapped DeiT side by side: on two real photographs, then trained on handwritten digits"
    )
    parser.add_argument(
        "--out", default=DEFAULT_OUT, metavar="DIR", help="for the plot and the checkpoints; default: %(default)s"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run both halves; 1 where the swapped model does not do what the stock model does."""
    with user_input():
        for module in ("timm", "transformers", "accelerate", "sklearn", "matplotlib", "PIL", "rich"):
            require(module, extra="demo")
        out = writable_folder(args.out)
    from rich.console import Console

    from deit_fast.cli import demo_training

    console = Console(highlight=False)
    device = find_device(None)
    # On a GPU stock convolutions use TF32 unless told otherwise: that alone would pass the limits.
    tf32.forbid_in_convolutions()

    console.print(f"[bold]deit_fast {deit_fast.__version__}[/], torch {torch.__version__}, on {describe(device)}")
    agree = demo_inference.run(console, device)
    learnt = demo_training.run(console, device, out)
    console.rule()
    console.print("Every answer agrees." if agree else "[bold red]Answers differ.[/]")
    console.print("Stock and swapped learn alike." if learnt else "[bold red]Training failed.[/]")
    return 0 if agree and learnt else 1


def writable_folder(path: str | Path, named: str = "--out") -> Path:
    """The folder, made where it is not there.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{named} {path} is no folder that can be written to: {error.strerror}") from error
    return folder


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"
