"""`deit-fast run`: somebody's script as it is, with every DeiT and ViT that it builds swapped."""

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from torch.nn import Module

from deit_fast.cli.errors import UserError
from deit_fast.swap import CallReport, SwapReport
from deit_fast.swap.birth import swapped_at_birth
from deit_fast.swap.core import report


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "run",
        help="run a script with every DeiT and ViT that it builds swapped",
        usage="deit-fast run [-h] [--report] SCRIPT|-m MODULE ...",
        description="Runs a Python script, or with -m a module, as `python` does, and swaps every DeiT and ViT of "
        "timm, transformers and the original repository when it has been built. A line on stderr says what was. "
        "With several processes: `torchrun -m deit_fast run SCRIPT ...`, `accelerate launch -m deit_fast run SCRIPT "
        "...`. In processes that the script itself spawns, models stay as they are; forked ones are like their parent.",
    )
    parser.add_argument("--report", action="store_true", help="print each model's modules, and at the end its calls")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is the name of a module")
    parser.add_argument("script", metavar="SCRIPT|MODULE")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it, and exit as it does."""
    script = args.script
    if not args.module and not Path(script).exists():
        raise UserError(f"there is no script {script} (a module's name comes after -m)")
    # As Python sets them for a script of its own.
    sys.argv = [script, *args.arguments]
    sys.path[0] = os.getcwd() if args.module else str(Path(script).resolve().parent)
    said = _Said(script, args.report)
    try:
        with swapped_at_birth(said.born):
            if args.module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
    finally:
        said.at_end()
    return 0


class _Said:
    """What the user is told, by the first process of several."""

    def __init__(self, script: str, whole: bool):
        self.script, self.whole = script, whole
        self.speaks = os.environ.get("RANK", "0") == "0"
        self.built = 0
        self.calls: list[tuple[str, CallReport]] = []

    def born(self, model: Module, found: SwapReport | ImportError) -> None:
        self.built += 1
        name = type(model).__name__
        if isinstance(found, ImportError):
            self.say(f"{name} stays as it is: {found}")
            return
        kept = f", {len(found.kept)} kept" if found.kept else ""
        why = " (--report says why)" if found.kept and not self.whole else ""
        self.say(f"{name}: {len(found.swapped)} modules swapped{kept}{why}")
        if self.whole:
            self.say(str(found))
            # They count on, and the script may let go of its model.
            self.calls.append((name, report(model)))

    def at_end(self) -> None:
        if not self.built:
            self.say(f"{self.script} built no DeiT or ViT; nothing was swapped")
        for name, calls in self.calls:
            self.say(f"calls of {name}:\n{calls}")

    def say(self, text: str) -> None:
        if self.speaks:
            print(f"deit-fast run: {text}", file=sys.stderr, flush=True)
