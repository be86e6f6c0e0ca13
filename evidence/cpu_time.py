"""Times timm's models on this processor, stock and swapped in turn.

    python -m evidence.cpu_time [--only NAME,…] [--rounds 9] [--budget 1200]

A round runs one step of the stock model and one of the swapped, the same model with the same weights, images and seed,
so that drop path keeps the same samples; every other round the swapped one goes first. The result is the median of
the rounds' ratios, stock / swapped, with the lowest and the highest: what else the machine does meanwhile falls on
both sides of a ratio, which the times alone don't have. Each round draws other masks, so part of that spread is theirs.

A training step is forward, cross-entropy and backward. The optimizer, the same for both, is left out, so that no
round changes a weight. 'Difference' is that of the logits (relative L2 norm), the largest of all rounds: it shows that
both computed the same, with the same samples dropped. LayerScale is 1, since at the 1e-6 that DeiT III starts from no
branch would show in it.

No round begins that by the last one's time would end after --budget seconds; the first always runs. Fewer rounds than
9 are marked: their median says little.

Where the processor has no 16-bit instructions torch multiplies bfloat16 in scalar loops, and deit_fast in float32
(`deit_fast.ops.product_dtype`). Most of a bfloat16 ratio then comes from that. The same rows in float32 show
what skipping alone gives.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.benchmark.provenance import processor
from deit_fast.check.accuracy import relative_error
from evidence.models import IMAGE_SIZE, choices
from evidence.recipes import RECIPES, Recipe

ENOUGH_ROUNDS = 9


@dataclass(frozen=True)
class PairedCase:
    recipe: Recipe
    batch: int
    training: bool = True
    autocast: bool = False

    @property
    def label(self) -> str:
        step = f"training, drop path {self.recipe.drop_path}" if self.training else "inference"
        precision = "autocast to bfloat16" if self.autocast else "float32"
        return f"{self.recipe.name} | {step} | {precision} | {self.batch}"


_SMALL = RECIPES["small"]
_THREE_SMALL = Recipe("DeiT III-S", "deit3_small_patch16_224", 0.3)
_THREE_LARGE = RECIPES["3-large"]
CASES = {
    "small-inference": PairedCase(_SMALL, 16, training=False),
    "small": PairedCase(_SMALL, 16),
    "3-small": PairedCase(_THREE_SMALL, 16),
    "3-large": PairedCase(_THREE_LARGE, 8),
    "small-inference-bf16": PairedCase(_SMALL, 16, training=False, autocast=True),
    "small-bf16": PairedCase(_SMALL, 16, autocast=True),
    "3-small-bf16": PairedCase(_THREE_SMALL, 16, autocast=True),
    "3-large-bf16": PairedCase(_THREE_LARGE, 8, autocast=True),
}


@dataclass(frozen=True)
class Round:
    """Seconds of either step."""

    stock: float
    swapped: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.stock / self.swapped


def measure(case: PairedCase, rounds: int, budget: float, progress: Callable[[str], None]) -> list[Round]:
    import deit_fast

    torch.manual_seed(0)
    model = case.recipe.build().train(case.training)
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            nn.init.ones_(parameter)
    pixels, labels = torch.randn(case.batch, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(1000, (case.batch,))

    def run(swapped: bool, seed: int, images: int = case.batch) -> tuple[float, Tensor]:
        with deit_fast.swapped(model) if swapped else nullcontext():
            return _timed_step(model, case, pixels[:images], labels[:images], seed)

    # One image warms up: in scalar loops a whole batch takes minutes.
    for swapped in (False, True):
        run(swapped, seed=0, images=1)
    done: list[Round] = []
    began = round_began = time.perf_counter()
    while len(done) < rounds:
        order = (False, True) if len(done) % 2 == 0 else (True, False)
        found = {swapped: run(swapped, seed=len(done)) for swapped in order}
        (stock, expected), (swapped, logits) = found[False], found[True]
        done.append(Round(stock, swapped, relative_error(logits, expected)))
        progress(f"round {len(done)}: stock {stock:.3f} s, swapped {swapped:.3f} s, ratio {stock / swapped:.3f}")
        now = time.perf_counter()
        if now - began + (now - round_began) > budget:
            break
        round_began = now
    return done


def _timed_step(model: nn.Module, case: PairedCase, pixels: Tensor, labels: Tensor, seed: int) -> tuple[float, Tensor]:
    """Seconds, and the logits."""
    model.zero_grad()
    torch.manual_seed(seed)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.autocast)
    began = time.perf_counter()
    if case.training:
        with autocast:
            logits = model(pixels)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
    else:
        with torch.inference_mode(), autocast:
            logits = model(pixels)
    return time.perf_counter() - began, logits.detach().double()


def line(case: PairedCase, done: list[Round]) -> str:
    ratios = [each.ratio for each in done]
    few = "" if len(done) >= ENOUGH_ROUNDS else f" (fewer than {ENOUGH_ROUNDS})"
    return (
        f"| {case.label} | {len(done)}{few} "
        f"| {median(each.stock for each in done):.3f} | {median(each.swapped for each in done):.3f} "
        f"| {median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} "
        f"| {max(each.difference for each in done):.1e} |"
    )


HEADER = (
    "| timm model | step | precision | batch | rounds | stock, s | swapped, s | stock / swapped | spread "
    "| difference |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---|---:|"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.cpu_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(CASES), help="of %(default)s")
    parser.add_argument("--rounds", type=int, default=ENOUGH_ROUNDS, help="of each row")
    parser.add_argument("--budget", type=float, default=1200, help="seconds a row")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        raise SystemExit(f"--rounds must be at least 1, got {arguments.rounds}")

    names = choices(arguments.only, CASES, "row")

    print(f"{processor()}; torch {torch.__version__}", flush=True)
    lines = []
    for name in names:
        case = CASES[name]
        print(f"\n{name}", flush=True)
        done = measure(case, arguments.rounds, arguments.budget, lambda text: print(text, flush=True))
        lines.append(line(case, done))
    print("\n" + "\n".join([HEADER, *lines]))


if __name__ == "__main__":
    main()
