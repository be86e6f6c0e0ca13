"""What every test of the swap asks of a model."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# The operators add up in another order than the stock modules. Logits are of order one.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter at a start value that hides it (zero biases, unit norms), and logits of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and not name.endswith(("token", "pos_embed", "position_embeddings")):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                # Norm weights and LayerScale around one, the rest around zero.
                parameter.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
                if "gamma" in name:
                    parameter.add_(0.5)
    return model


def operator_calls(run: Callable[[], object]) -> Counter[str]:
    """How often each deit_fast operator is called in `run()`, without gradients."""
    calls: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "deit_fast":
                calls[function._opname] += 1
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        run()
    return calls


def block_calls(blocks: int, *, readout: bool = True, **others: int) -> dict[str, int]:
    """What a classifier calls without gradients: one patch embedding, its blocks' operators, one final norm.

    With `readout` the last block is computed for the rows that are read alone.
    """
    calls = {"layer_norm_linear": 2 * blocks, "attention": blocks, "linear_residual": 2 * blocks}
    if readout:
        calls |= {"layer_norm_linear": 2 * blocks - 1, "attention": blocks - 1, "readout_attention": 1}
    calls |= {"patch_embed": 1, "layer_norm": 1} | others
    return {op: count for op, count in calls.items() if count}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that gets one; the model's are left as they were: none."""
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype and result.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def assert_same_gradients(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding, each relative to its size; the key bias's is rounding noise and is left out."""
    assert result.keys() == expected.keys()
    for name in expected:
        if "k_proj.bias" in name:
            continue
        # All zero where drop path drops every sample.
        scale = expected[name].abs().max().item() or 1.0
        torch.testing.assert_close(result[name] / scale, expected[name] / scale, rtol=0, atol=1e-4, msg=name)


class LoraLinear(nn.Linear):
    """A linear with a low-rank addition, as adapter libraries put in a linear's place."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T
