"""What each operator's launches tell a profiler, beside its FLOP formula, and those of blocks; prints JSON for
`test_metadata`.

A program of its own because the test process has TRITON_INTERPRET set.
"""

import json
from unittest import mock

import torch
from triton.runtime import jit

from deit_fast import ops
from deit_fast.benchmark.flops import flop_counter
from deit_fast.check.cases import INTERPRETER_SIZES, OPS, cases
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.nn import Block
from deit_fast.ops import backend
from tests.kernels.launching.replay_checks import Gpu, of_case


class Described(Gpu):
    """Notes every launch's metadata, and its work: the kernel with its arguments, tensors by shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata: list[dict] = []

    def run_kernel(self, kernel, *args, grid, warmup, **options):
        compiled = super().run_kernel(kernel, *args, grid=grid, warmup=warmup, **options)
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        work = [
            f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else str(value)
            for value in (given[name] for name in kernel.arg_names)
        ]
        told = kernel.launch_metadata(grid, compiled, given)
        self.metadata.append({**told, "kernel": kernel.__name__, "work": " ".join((kernel.__name__, *work))})
        return compiled


def steps(gpu: Described) -> dict[str, list[dict]]:
    """Launches of DeiT-S's block, forward and backward, by how it is made."""
    found = {}
    for name, options, dtype in (
        ("plain", {}, torch.bfloat16),
        ("DeiT III", {"init_values": 1e-4, "drop_path": 0.5}, torch.bfloat16),
        ("float16", {}, torch.float16),
    ):
        block = Block(384, 6, qkv_bias=True, **options).train().to(dtype)
        x = torch.zeros(4, 198, 384, dtype=dtype, requires_grad=True)
        gpu.metadata.clear()
        block(x).sum().backward()
        found[name] = list(gpu.metadata)
    return found


def compiled(target: str) -> list[str]:
    """The names of compiled kernels: QKV, twice with other rows, and LayerNorm."""
    shapes = (2, 198, 768), (768,), (2304, 768), (2304,)
    x, vector, weight, bias = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
    with recording(TARGETS[target]) as launches, backend.forced("triton"):
        for rows in (x, x[:, :150].contiguous()):
            ops.linear(rows, weight, bias)
        ops.layer_norm(x, vector, None, 1e-6)
    return [each.compiled.metadata.name for each in launches]


def main() -> None:
    gpu, found = Described(), []
    with (
        recording(TARGETS["sm_90"]),
        backend.forced("triton"),
        mock.patch.object(jit.JITFunction, "run", lambda kernel, *a, **k: gpu.run_kernel(kernel, *a, **k)),
    ):
        for op in OPS:
            for case in cases(op, INTERPRETER_SIZES[0], torch.bfloat16, torch.device("cpu")):
                function = of_case(case)
                with flop_counter() as counter:
                    function()
                gpu.metadata.clear()
                function()
                told = sum(value for each in gpu.metadata for name, value in each.items() if name.startswith("flops"))
                found.append(
                    {
                        "title": f"{op} {case.title}",
                        "formula": counter.get_total_flops(),
                        "told": told,
                        "metadata": list(gpu.metadata),
                    }
                )
        blocks = steps(gpu)
    symbols = {target: compiled(target) for target in ("sm_90", "gfx942")}
    print(json.dumps({"operators": found, "blocks": blocks, "symbols": symbols}))


if __name__ == "__main__":
    main()
