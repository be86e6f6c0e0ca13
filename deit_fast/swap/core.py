"""Finds the modules that have a swapped class, sets their class, and sets it back."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import Module

from deit_fast.nn.options import check_memory
from deit_fast.ops import backend
from deit_fast.swap import layer_norm  # noqa: F401  (registers torch's LayerNorm)
from deit_fast.swap.calls import CallReport, calls_in
from deit_fast.swap.copies import OWN, RESTORED
from deit_fast.swap.report import SwapReport
from deit_fast.swap.rules import RULES, Rule

_LIBRARIES = ("timm", "transformers")
_SUPPORTED = (
    "timm's VisionTransformer models and their parts (deit, deit3, vit), transformers' DeiT and ViT models, "
    "and the models of the original DeiT repository"
)


def swap(
    model: Module, *, memory: str = "balanced", readout: bool = True, compact_drop_path: bool = False
) -> SwapReport:
    """Puts `model`'s modules on the fused operators, in place.

    Parameters, buffers, names, hooks and `state_dict` stay as they are; only `__class__` changes. A block runs whole
    where all its parts are what the kernels compute, and part by part where one is not. That is asked again at every
    call; the report says how it stands now. Swapping again changes no more than the options and reports anew.

    memory: what a block keeps for backward. "balanced": its input, qkv, the attention output and log-sum-exp, the
    input of its MLP half and the MLP's pre-activation. "low": the pre-activation is computed again. Neither keeps
    a LayerNorm's or GELU's output, and neither changes a value.

    readout: a classifier reads only the CLS (and distillation) row of its last block, so only those rows are computed
    there, with the same values and gradients. False: the last block is computed whole.

    compact_drop_path: with stochastic depth only the kept samples are computed in any case. On a GPU their tensors
    have room for all samples, so that the host never waits. True: one read a step, before the first block, of how
    many each branch keeps, and no room for more: saved memory falls with the drop rate (timm's models; not where
    blocks are checkpointed or compiled). On a CPU it is always so.

    Drop path draws from one seed what the stock model draws from it; under `torch.compile`, what the stock model
    compiled alike draws. On a GPU Inductor's draws are not eager mode's (`torch._inductor.config.fallback_random`).

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in `model` is known, or no such `memory`.
        ImportError: the installed release of the model's library is too old.
    """
    if not isinstance(model, Module):
        raise TypeError(f"deit_fast.swap takes a torch.nn.Module, got {type(model).__name__}")
    check_memory(memory)
    _load_rules(model)
    found = {name: (module, rule) for name, module in model.named_modules() if (rule := _find_rule(module))}
    if all(rule.stock is nn.LayerNorm for _, rule in found.values()):
        raise ValueError(f"deit_fast.swap found nothing to swap in this {type(model).__name__}; it knows {_SUPPORTED}")
    for module, rule in found.values():
        if _is_stock(module, rule):
            _set_class(module, rule.stock, rule.swapped)
        module.__dict__.pop(RESTORED, None)
        module.__dict__["_deit_fast_memory"] = memory
        module.__dict__["_deit_fast_readout"] = readout
        module.__dict__["_deit_fast_compact"] = compact_drop_path
    report = SwapReport(lacking=_lacking(model))
    with _as_gathered(model):
        for name, (module, rule) in found.items():
            report.classes[name] = _unwrapped(type(module)).__name__
            reason = _obstacle(module, rule) or rule.unfusable(module)
            if reason is None:
                report.swapped.append(name)
            else:
                report.kept[name] = reason
            if rule.readout_unfusable is not None:
                report.readout[name] = reason or rule.readout_unfusable(module)
    return report


def report(model: Module) -> CallReport:
    """How often each swapped module of `model` ran on the operators since the swap, how often as stock, and why.

    Print it after a step. Whatever people did to the model that an operator can't compute shows there.
    """
    return calls_in(model, lambda module: _swapped_rule(module) is not None)


def restore(model: Module) -> None:
    """Sets every swapped module of `model` back to its stock class; a model that was never swapped stays as it is."""
    _restore(model.modules())


@contextmanager
def swapped(
    model: Module, *, memory: str = "balanced", readout: bool = True, compact_drop_path: bool = False
) -> Iterator[SwapReport]:
    """`swap` for the length of a `with` block; what was swapped before stays swapped after it, with its own options.

    Raises:
        TypeError, ValueError, ImportError: as `swap` does.
    """
    before = {module: _options(module) for module in model.modules() if _swapped_rule(module)}
    report = swap(model, memory=memory, readout=readout, compact_drop_path=compact_drop_path)
    try:
        yield report
    finally:
        _restore(module for module in model.modules() if module not in before)
        for module, options in before.items():
            module.__dict__.update(options)


@contextmanager
def as_stock(model: Module) -> Iterator[None]:
    """Within the block `model` is stock; after it, what was swapped is so again, with its own options."""
    before = [(module, rule, _options(module)) for module in model.modules() if (rule := _swapped_rule(module))]
    _restore(module for module, _, _ in before)
    try:
        yield
    finally:
        for module, rule, options in before:
            if _is_stock(module, rule):
                _set_class(module, rule.stock, rule.swapped)
            module.__dict__.pop(RESTORED, None)
            module.__dict__.update(options)


def swapped_parts(model: Module) -> dict[str, Module]:
    """By name, the outermost swapped modules of `model`, looking into classifiers: blocks, embeddings, norms."""
    found: dict[str, Module] = {}
    for name, module in model.named_modules():
        rule = _swapped_rule(module)
        if rule is not None and rule.readout_unfusable is None and not any(name.startswith(f"{p}.") for p in found):
            found[name] = module
    return found


def _options(module: Module) -> dict[str, object]:
    return {name: module.__dict__[name] for name in OWN if name in module.__dict__}


def _restore(modules: Iterator[Module]) -> None:
    for module in modules:
        rule = _swapped_rule(module)
        if rule is None:
            continue
        for name in OWN:
            module.__dict__.pop(name, None)
        if _unwrapped(type(module)) is rule.swapped:
            _set_class(module, rule.swapped, rule.stock)
        else:
            # Somebody derived a class from ours: it stays, and ours is stock within it.
            module.__dict__[RESTORED] = True


def _lacking(model: Module) -> list[str]:
    """Why the stock operators will run on the GPUs that `model` is on, where they will."""
    if not torch.cuda.is_available():  # fake tensors may be on a GPU that isn't there
        return []
    on_gpus = {(p.dtype, p.device): p for p in model.parameters() if p.is_cuda}
    return sorted({reason for p in on_gpus.values() if (reason := backend.no_products(p))})


# Finding ----------------------------------------------------------------------------------------------------------


def _load_rules(model: Module) -> None:
    """Imports the rules of the libraries that `model`'s classes come from, and of no other."""
    classes = {base for cls in {type(module) for module in model.modules()} for base in cls.__mro__}
    for library in {cls.__module__.partition(".")[0] for cls in classes}.intersection(_LIBRARIES):
        importlib.import_module(f"deit_fast.swap.{library}")


def _find_rule(module: Module) -> Rule | None:
    cls = _unwrapped(type(module))
    if cls in RULES:
        return RULES[cls]
    if cls.__module__.partition(".")[0] not in ("torch", "deit_fast", *_LIBRARIES):
        from deit_fast.swap import original

        rule = original.find_rule(cls, module)
        if rule is not None:
            return rule
    # A subclass with code of its own: reported as kept, save that torch's LayerNorm is the base of many norms.
    base = next((base for base in cls.__mro__ if base in RULES), nn.LayerNorm)
    return None if base is nn.LayerNorm else RULES[base]


def _swapped_rule(module: Module) -> Rule | None:
    if RESTORED in module.__dict__:
        return None
    for base in type(module).__mro__:
        rule = RULES.get(base)
        if rule is not None:
            return rule if rule.swapped is base else None
    return None


def _is_stock(module: Module, rule: Rule) -> bool:
    return _unwrapped(type(module)) is rule.stock


def _obstacle(module: Module, rule: Rule) -> str | None:
    """Why the swapped class is not what a call of `module` reaches, or None."""
    cls = _unwrapped(type(module))
    if cls is not rule.swapped and not _derived_here(cls, rule):
        return f"{cls.__name__} is a subclass of {rule.stock.__name__} with code of its own"
    for method in rule.methods:
        if method in module.__dict__ and (method != "forward" or _captured_forward(module) is None):
            return f"has a {method} of its own on the instance"
    return None


def _derived_here(cls: type, rule: Rule) -> bool:
    """Whether it is deit_fast.transformers' subclass of the swapped one, which calls its methods."""
    return issubclass(cls, rule.swapped) and cls.__module__ == rule.stock.__module__


@contextmanager
def _as_gathered(model: Module) -> Iterator[None]:
    """The parameters that fully_shard gathers for each call stand as plain tensors, as they do during the call."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        yield
        return
    from torch.distributed.tensor import DTensor

    sharded = [
        (module, name, parameter)
        for unit in model.modules()
        if isinstance(unit, fsdp.FSDPModule)
        for module in unit.modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    stand_in = nn.Parameter(torch.empty(0), requires_grad=False)
    for module, name, _ in sharded:
        module._parameters[name] = stand_in
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


# Setting ----------------------------------------------------------------------------------------------------------


def _set_class(module: Module, old: type, new: type) -> None:
    captured = _captured_forward(module)
    module.__class__ = _rebased(type(module), old, new)
    if captured is not None:
        module.__dict__[captured] = MethodType(type(module).forward, module)


def _captured_forward(module: Module) -> str | None:
    """The attribute in which a hook of Accelerate's keeps the bound forward it was put in front of.

    Having taken the hook off, Accelerate leaves the bound forward itself on the instance.
    """
    for attribute in ("_old_forward", "forward"):
        if getattr(module.__dict__.get(attribute), "__func__", None) is type(module).forward:
            return attribute
    return None


def _unwrapped(cls: type[Module]) -> type[Module]:
    """The class beneath those that torch makes at run time (fully_shard, replicate, parametrize)."""
    return next(base for base in cls.__mro__ if base in RULES or not _made_by_torch(base))


def _made_by_torch(cls: type) -> bool:
    """Whether it was made at run time, so that its own module does not have it, or is what such a class adds."""
    if not issubclass(cls, Module):
        return True
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return cls.__module__.partition(".")[0] == "torch" and found is not cls


_REBASED: dict[tuple[type, type], type] = {}


def _rebased(cls: type, old: type, new: type) -> type:
    """`cls` with `new` where it derives from `old`: torch's wrapper around another class."""
    if cls is old:
        return new
    if old not in cls.__mro__:
        return cls
    # A forward in a wrapper is what transformers' checkpointing layer put there, and puts there again.
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "forward")}
    bases = tuple(_rebased(base, old, new) for base in cls.__bases__)
    # A parametrized class belongs to one module, whose properties it holds.
    if cls.__module__ == "torch.nn.utils.parametrize":
        return type(cls.__name__, bases, body)
    # The others are shared, so that torch.compile sees one class, not one a module.
    if (cls, new) not in _REBASED:
        rebased = type(cls.__name__, bases, body)
        _REBASED[cls, new] = rebased
        _REBASED[rebased, old] = cls
    return _REBASED[cls, new]
