"""A model that FSDP2 has sharded: its tensors gathered, as checkpoints have them, and in parts again."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

# Those whose state is scalars and tensors of the weights' shapes.
# FSDP2 has no rule for the fused SGD.
OPTIMIZERS = ("adam", "adamw", "lamb")


def gathered(tree: Any, keep: bool = True) -> Any:
    """`tree` with each sharded tensor put together, on the CPU; others are as they are.

    All processes call it together. Without `keep` None is in the place of what was put together.
    """

    def together(tensor: DTensor) -> Tensor | None:
        full = tensor.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(DTensor, together, tree)


def in_parts(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The gathered state dict `state`, as `optimizer` loads it: of a sharded weight this process's part."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def part(weight: Tensor, value: Any) -> Any:
        if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    by_weight = {
        index: {name: part(weights[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": by_weight}
