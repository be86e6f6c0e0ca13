"""Runs a script of the original DeiT repository with today's timm, where names that it imports have changed.

    deit-fast run examples/original_deit.py deit/main.py --model deit_small_patch16_LS --data-path imagenet ...

The script itself stays as it is. Without `deit-fast run` its models are stock.
"""

import functools
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from timm.data import transforms

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # timm's, of the old name
    from timm.models import registry


def without_configuration(register: Callable) -> Callable:
    """`register_model` for functions that build a model of `pretrained` and its sizes alone, as they once all did."""

    def register_model(build: Callable) -> Callable:
        @functools.wraps(build)
        def built(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **sizes):
            return build(pretrained, **sizes)

        return register(built)

    return register_model


def main(script: str, *arguments: str) -> None:
    transforms._pil_interp = transforms.str_to_pil_interp
    registry.register_model = without_configuration(registry.register_model)
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda: None  # which it calls with `--device cpu`, too
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
