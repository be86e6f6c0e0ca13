"""What counts as a part that the kernels compute: exact classes, so that a subclass is never mistaken for its base.

`deit_fast.swap` adds each library's classes to these sets.
"""

from typing import Any

from torch import Tensor
from torch import nn as torch_nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Module, Parameter

# A module of any library, for the attributes and children that its reader names and its guard has checked by class:
# torch types every one of them `Tensor | Module`.
Part = Any

LINEARS: set[type] = {torch_nn.Linear}
LAYER_NORMS: set[type] = {torch_nn.LayerNorm}
LAYER_SCALES: set[type] = set()
DROP_PATHS: set[type] = set()
ATTENTIONS: set[type] = set()
MLPS: set[type] = set()
BLOCKS: set[type] = set()
IDENTITIES: set[type] = {torch_nn.Identity}

# Activation modules by what the operators call them; torch's own GELU says which it is by an attribute.
GELUS: dict[type, str] = {}

# Fake and functional tensors are what tracers put in an ordinary tensor's place.
_PLAIN_TENSORS = frozenset({Parameter, Tensor, FakeTensor, FunctionalTensor, type(None)})


def touched(module: Module) -> str | None:
    """Why `module` must be called as a module: a hook, or a forward that someone put on the instance."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "has a hook"
    # Accelerate leaves the class's own forward behind, bound, when its hooks come off: that changes nothing.
    if "forward" in state and getattr(state["forward"], "__func__", None) is not type(module).forward:
        return "has a forward of its own on the instance"
    return None


def plain_parameters(module: Module) -> bool:
    """Whether every parameter is an ordinary tensor (not a quantized or sharded tensor subclass)."""
    for parameter in module._parameters.values():  # noqa: SIM110 (a generator takes twice as long)
        if type(parameter) not in _PLAIN_TENSORS:
            return False
    return True


def weight_and_bias(module: Part) -> tuple[Tensor, Tensor | None]:
    """`module.weight` and `module.bias`, past the search in Python that module attributes take."""
    parameters = module._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    # What wraps or shards a model may have put tensors in their place.
    return module.weight, module.bias


def unfusable(module: Module, classes: set[type]) -> str | None:
    """Why `module` can't be computed from its parameters alone, or None."""
    if type(module) not in classes:
        return f"is a {class_name(module)}"
    if not plain_parameters(module):
        return "has a tensor subclass for a parameter"
    return touched(module)


def class_name(module: Module) -> str:
    """With its module's name, unless torch's: a LoRA layer is a `Linear` too."""
    kind = type(module)
    home = "" if kind.__module__.startswith("torch.") else f"{kind.__module__}."
    return home + kind.__qualname__


def gelu_name(activation: Part) -> str | None:
    """The operators' name of an activation module: "gelu" (erf) or "gelu_tanh"; None for any other."""
    if type(activation) is torch_nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return GELUS.get(type(activation))


def idle_dropout(module: Part) -> bool:
    """Whether a dropout (or whatever stands in its place) passes its input through right now."""
    if type(module) is torch_nn.Dropout:
        return not (module.training and module.p > 0.0) and touched(module) is None
    return type(module) in IDENTITIES and touched(module) is None
