"""What counts as a part that the kernels compute: exact classes, so that a subclass is never mistaken for its base.

`deit_fast.swap` adds each library's classes. Every class is one only as long as its forward is the one that was read
for it: whoever replaces a stock class's method is obeyed.
"""

from typing import Any

from torch import Tensor
from torch import nn as torch_nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Module, Parameter

from deit_fast.nn.code import Code, code_of

# A module of any library, for the attributes and children that its reader names and its guard has checked by class:
# torch types every one of them `Tensor | Module`.
Part = Any

Classes = dict[type, Code]


def add(classes: Classes, *added: type[Module], stock: type[Module] | None = None, recognised: bool = False) -> None:
    """These are such parts; `stock` is the class that they compute, by default each itself.

    recognised: the stock class computes it as it is now, else as its library wrote it.
    """
    classes.update({cls: code_of(cls, stock or cls, recognised) for cls in added})


LINEARS: Classes = {}
CONVOLUTIONS: Classes = {}
LAYER_NORMS: Classes = {}
PATCH_EMBEDS: Classes = {}
LAYER_SCALES: Classes = {}
DROP_PATHS: Classes = {}
DROPOUTS: Classes = {}
ATTENTIONS: Classes = {}
MLPS: Classes = {}
BLOCKS: Classes = {}
IDENTITIES: Classes = {}
SEQUENCES: Classes = {}
ACTIVATIONS: Classes = {}

add(LINEARS, torch_nn.Linear)
add(CONVOLUTIONS, torch_nn.Conv2d)
add(LAYER_NORMS, torch_nn.LayerNorm)
add(DROPOUTS, torch_nn.Dropout)
add(IDENTITIES, torch_nn.Identity)
add(SEQUENCES, torch_nn.Sequential)
add(ACTIVATIONS, torch_nn.GELU)

# Other activation modules by what the operators call them; torch's own GELU says which it is by an attribute.
GELUS: dict[type, str] = {}

REPLACED = "has a class whose code was replaced"

# Fake and functional tensors are what tracers put in an ordinary tensor's place.
_PLAIN_TENSORS = frozenset({Parameter, Tensor, FakeTensor, FunctionalTensor, type(None)})


def touched(module: Module, hooked: bool = False) -> str | None:
    """Why `module` must be called as a module: a hook, or a forward that someone put on the instance.

    hooked: its forward hooks are known and change nothing.
    """
    state = module.__dict__
    if (
        (state["_forward_hooks"] and not hooked)
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


def out_features(linear: Part) -> int | None:
    """As its weight [N, K] says; None where that is sharded, and not gathered now."""
    return weight_and_bias(linear)[0].size(0) or None


def unfusable(module: Module, classes: Classes, hooked: bool = False) -> str | None:
    """Why `module` can't be computed from its parameters alone, or None; `hooked` as of `touched`."""
    cls: Any = type(module)
    code = classes.get(cls)
    if code is None:
        return f"is a {class_name(module)}"
    forward, stock, stock_forward = code
    if cls.forward is not forward or stock.forward is not stock_forward:
        return REPLACED
    if not plain_parameters(module):
        return "has a tensor subclass for a parameter"
    return touched(module, hooked)


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
    cls: Any = type(module)
    code = DROPOUTS.get(cls)
    if code is None:
        return is_identity(module)
    return not (module.training and module.p > 0.0) and cls.forward is code.stock_forward and touched(module) is None


def is_identity(module: Part | None) -> bool:
    """Whether nothing stands here, or what changes nothing."""
    if module is None:
        return True
    cls: Any = type(module)
    code = IDENTITIES.get(cls)
    return code is not None and cls.forward is code.stock_forward and touched(module) is None
