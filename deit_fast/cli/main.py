"""Entry point of `deit-fast`: the arguments of each subcommand."""

import argparse
import os
import sys
from collections.abc import Sequence

from deit_fast import __version__
from deit_fast.cli import bench, check, convert, demo, evaluate, gpu, plan, predict, run, train, tune
from deit_fast.cli.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1 for a failed check, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="deit-fast", description="DeiT on fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"deit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (predict, run, train, evaluate, convert, plan, demo, check, bench, tune, gpu):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"deit-fast: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever reads has read enough, as `head` does; Python would flush once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
