"""Drop path under Inductor, whose random numbers on a GPU are its own: stock's masks from one seed, one a step.

A GPU's graphs on a CPU: Inductor's decompositions, passes and partitioner, then its nodes one by one instead of its
code, each draw from the seed that Inductor gave it.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor import inductor_prims
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch.utils.checkpoint import checkpoint

from deit_fast.ops import backend
from deit_fast.swap import swap
from tests.swap.helpers import assert_close, operator_calls, randomise

pytest.importorskip("timm")
from timm.models.vision_transformer import Block

BATCH, DROPPED = 64, 0.5


class Seeded(torch.fx.Interpreter):
    draws = 0

    def call_function(self, target, args, kwargs):
        if target is not inductor_prims.random:
            return super().call_function(target, args, kwargs)
        Seeded.draws += 1
        size, seed, mode = args
        assert mode == "rand"
        return torch.rand(size, generator=torch.Generator().manual_seed(int(seed)))


def compiler(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    return make_boxed_func(Seeded(graph).run)


def partition(joint: torch.fx.GraphModule, inputs: list, **options) -> tuple:
    with V.set_fake_mode(detect_fake_mode(inputs)):
        joint_graph_passes(joint)
    return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **options)


def inductor() -> Callable:
    # As for a GPU; Inductor leaves a CPU's to PyTorch.
    draws = {
        torch.ops.aten.bernoulli.p: lambda x, p=0.5, *, generator=None: torch.rand_like(x, dtype=torch.float32) < p,
        torch.ops.aten.bernoulli_.float: lambda x, p=0.5: x.copy_(torch.rand_like(x, dtype=torch.float32) < p),
    }
    return aot_autograd(fw_compiler=compiler, partition_fn=partition, decompositions={**select_decomp_table(), **draws})


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    Seeded.draws = 0
    yield
    torch.compiler.reset()


def build() -> nn.Module:
    return randomise(Block(32, 1, qkv_bias=True, drop_path=DROPPED)).train()


def step(call: Callable, block: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, ...]:
    """The output, the gradients, and which samples passed both branches by: in forward, and in backward."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    upstream = torch.linspace(-1, 1, x.numel()).view(x.shape)
    out = call(x)
    gradients = torch.autograd.grad(out, [x, *block.parameters()], upstream)
    return out.detach(), gradients, (out == x).all((1, 2)), (gradients[0] == upstream).all((1, 2))


def steps(block: nn.Module, x: Tensor, checkpointed: bool) -> list[tuple]:
    def call(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)

    compiled = torch.compile(call, backend=inductor(), fullgraph=True)
    return [step(compiled, block, x, seed) for seed in range(8)]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_a_compiled_block_draws_what_stocks_draws_and_once_a_step(memory, checkpointed) -> None:
    block, x = build(), torch.randn(BATCH, 5, 32)
    expected = steps(block, x, checkpointed)
    assert Seeded.draws
    swap(block, memory=memory)
    torch.compiler.reset()
    # On a GPU operators are opaque to a graph, and so are stock operators in their place.
    with backend.forced("torch"):
        assert operator_calls(lambda: block(x))["keep_samples"]
        found = steps(block, x, checkpointed)
    for (out, gradients, dropped, undone), (stock, stock_gradients, stock_dropped, _) in zip(
        found, expected, strict=True
    ):
        assert_close(out, stock)
        for gradient, stock_gradient in zip(gradients, stock_gradients, strict=True):
            torch.testing.assert_close(gradient, stock_gradient, rtol=1e-4, atol=1e-4 * stock_gradient.abs().max())
        # To the bit: such samples are their residual, and their gradient is the one that came.
        assert torch.equal(dropped, stock_dropped) and torch.equal(undone, dropped)
    share = torch.stack([dropped for _, _, dropped, _ in found]).float().mean().item()
    # Of 512 draws, four standard deviations.
    assert abs(share - DROPPED**2) < 0.08
    assert len({tuple(dropped.tolist()) for _, _, dropped, _ in found}) == len(found)
