"""What counts as a part that the kernels compute: exact classes, so that a subclass is never mistaken for its base.

`deit_fast.swap` adds each library's classes to these sets.
"""

from torch import Tensor
from torch import nn as torch_nn
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LINEARS: set[type] = {torch_nn.Linear}
LAYER_NORMS: set[type] = {torch_nn.LayerNorm}
LAYER_SCALES: set[type] = set()
DROP_PATHS: set[type] = set()
ATTENTIONS: set[type] = set()
MLPS: set[type] = set()
IDENTITIES: set[type] = {torch_nn.Identity}

_PLAIN_TENSORS = (Parameter, Tensor)


def touched(module: Module) -> str | None:
    """Why `module` must be called as a module: a hook, or a forward that someone put on the instance."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has a hook"
    if "forward" in module.__dict__:
        return "has a forward of its own on the instance"
    return None


def plain_parameters(module: Module) -> bool:
    """Whether every parameter is an ordinary tensor (not a quantized or sharded tensor subclass)."""
    for parameter in module._parameters.values():
        # Exact types first: the general question costs ten times as much.
        if parameter is None or type(parameter) in _PLAIN_TENSORS:
            continue
        if is_traceable_wrapper_subclass(parameter):
            return False
    return True


def unfusable(module: Module, classes: set[type]) -> str | None:
    """Why `module` can't be computed from its parameters alone, or None."""
    if type(module) not in classes:
        return f"is a {type(module).__name__}"
    if not plain_parameters(module):
        return "has a tensor subclass for a parameter"
    return touched(module)


def gelu_name(activation: Module) -> str | None:
    """The operators' name of an activation module: "gelu" (erf) or "gelu_tanh"; None for any other."""
    if type(activation) is not torch_nn.GELU:
        return None
    return "gelu" if activation.approximate == "none" else "gelu_tanh"


def idle_dropout(module: Module) -> bool:
    """Whether a dropout (or whatever stands in its place) passes its input through right now."""
    if type(module) is torch_nn.Dropout:
        return not (module.training and module.p > 0.0) and touched(module) is None
    return type(module) in IDENTITIES and touched(module) is None
