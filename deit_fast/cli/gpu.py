"""`deit-fast gpu`: the first minutes on a GPU, so that nothing of them is lost."""

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deit_fast.cli.demo import writable_folder
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.kernels.launching.hardware import interpreted

if TYPE_CHECKING:
    from deit_fast.benchmark.gpu.record import Record

DEFAULT_OUT = "deit-fast-gpu"


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "gpu",
        help="check and time everything on this GPU, the most valuable first, within so many minutes",
        description="Checks the operators, times each launch, blocks and models beside stock PyTorch, and tunes, in "
        "processes of their own with deadlines. Writes results.json after every task, summary.md, and tuned settings "
        "in tuned/. A second call goes on where the first stopped; what failed is not tried again.",
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="default: %(default)g")
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", help="default: the GPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what there is time for; 1 where something failed."""
    from deit_fast.benchmark.gpu import run as runner
    from deit_fast.benchmark.gpu.steps import scope
    from deit_fast.benchmark.gpu.summary import failures, summary
    from deit_fast.check.environment import environment

    device = find_device(args.device)
    if device.type != "cuda":
        raise UserError("gpu needs an NVIDIA or AMD GPU that PyTorch can use, and there is none here")
    if interpreted():
        raise UserError("TRITON_INTERPRET is set, so nothing would run on the GPU: unset it")
    if args.minutes <= 0:
        raise UserError(f"--minutes must be above 0, got {args.minutes:g}")
    here = environment(device)
    with user_input():
        out = writable_folder(args.out)
        record = _begun(out, here)
    memory = torch.cuda.get_device_properties(device).total_memory

    def say(line: str) -> None:
        print(line, flush=True)
        (out / "summary.md").write_text(summary(record))

    # Workers are in sessions of their own: whoever ends this process must end them too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runner.run(record, scope(memory), device, 60 * args.minutes, out, say)
    except KeyboardInterrupt:
        print("Interrupted: what was done so far is written.")
    (out / "summary.md").write_text(summary(record))
    for step, names in record.not_reached.items():
        print(f"Not reached: {step}: {len(names)} tasks, from {names[0]} on; the same command goes on there")
    print(f"Written to {out}/: results.json, summary.md")
    return int(bool(failures(record)))


def _begun(out: Path, here: dict[str, str]) -> "Record":
    """The record of an earlier call on the same machine, or a new one.

    Raises:
        ValueError: the folder has results of another machine, or other versions.
    """
    from deit_fast.benchmark.gpu.record import Record

    if not (out / "results.json").exists():
        return Record(here)
    record = Record.read(out / "results.json")
    other = [name for name, value in here.items() if record.environment.get(name) != value]
    if other:
        differing = ", ".join(f"{name} {record.environment.get(name)}, here {here[name]}" for name in other)
        raise ValueError(f"--out {out} holds results of another machine or release ({differing}): give another folder")
    return record
