"""`deit-fast convert`: a checkpoint in another library's layout."""

import argparse
from typing import Any

from deit_fast.cli.errors import user_input
from deit_fast.models.conversion import LAYOUTS, convert


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "convert",
        help="a checkpoint for timm, transformers or the original repository",
        description="Writes the same tensors, bit for bit, by the names of another library. Image settings (mean, "
        "standard deviation, crop) and class names stay behind.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a .safetensors, .pth, .pt, .bin or .ckpt file, or a folder")
    parser.add_argument("target", metavar="TARGET", help="a new folder; for original a .safetensors or .pth file")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="whose layout TARGET has")
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads, where SOURCE doesn't say it")
    parser.add_argument("--force", action="store_true", help="replace TARGET")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what the model is and what was assumed."""
    with user_input():
        config, notes = convert(args.source, args.target, args.to, args.num_heads, args.force)
    _, height, width = config.input_size
    heads = f"{config.num_classes} classes" if config.num_classes else "no head"
    print(
        f"{args.target}: {'distilled, ' if config.distilled else ''}width {config.embed_dim}, {config.depth} blocks, "
        f"{config.num_heads} attention heads, {height} x {width} pixels in patches of {config.patch_size}, {heads}"
    )
    for note in notes:
        print(f"Note: {note}")
    return 0
