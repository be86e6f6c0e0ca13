"""The original DeiT repository: models, blocks and attention whose classes are the user's own files.

No module can be named in advance, and the same names and layouts are found in many repositories with small changes.
So a class is recognised by its parts (names of children and parameters), and then by what it computes: its forward
is run once, on a tiny double-precision stand-in, against the formula; and a model's with NaN in the rows that a
classifier should not read. The swapped class is made on the spot from ours and the user's.
"""

import inspect
import warnings
from collections.abc import Callable, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from deit_fast.nn import guards, options, parts
from deit_fast.nn.forward import attention_forward, both_branches
from deit_fast.nn.parts import Part
from deit_fast.nn.readout import reading, rows_read
from deit_fast.swap.rules import RULES, Mixin, Rule, register, stock_method, stock_wanted

_ATTENTION_PARTS = {"qkv", "attn_drop", "proj", "proj_drop"}
_BLOCK_PARTS = {"norm1", "attn", "drop_path", "norm2", "mlp"}
_CLASSIFIER_PARTS = {"patch_embed", "blocks", "norm", "head"}
_WIDTH = 8
_NOT_RECOGNISED: set[type] = set()


def find_rule(cls: type[Module], module: Module) -> Rule | None:
    """The rule for a class seen for the first time, with a module of it; None if it is no block or attention."""
    if cls in _NOT_RECOGNISED:
        return None
    mixin = _mixin(cls, module._modules.keys(), module._parameters.keys())
    if mixin is None:
        _NOT_RECOGNISED.add(cls)
        return None
    return RULES[_combined(cls, mixin)]


def _mixin(cls: type[Module], children: Set[str], parameters: Set[str]) -> type | None:
    if len(inspect.signature(cls.forward).parameters) != 2:  # self and the tokens
        return None
    with torch.random.fork_rng(devices=()), torch.device("cpu"), torch.no_grad():
        if children == _ATTENTION_PARTS and not parameters:
            return _Attention if _computes_attention(cls) else None
        if children == _BLOCK_PARTS and (not parameters or parameters == {"gamma_1", "gamma_2"}):
            return _Block if _computes_block(cls, layer_scale=bool(parameters)) else None
    return _Classifier if children >= _CLASSIFIER_PARTS else None


def _combined(stock: type[Module], mixin: type) -> type[Module]:
    rule = RULES.get(stock)
    if rule is None:
        body = {
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "_stock_forward": stock_method(stock.forward),
        }
        swapped = type(stock.__name__, (mixin, stock), body)
        if mixin is _Attention:
            parts.ATTENTIONS.add(swapped)
            register(stock, swapped, guards.attention_unfusable)
        elif mixin is _Block:
            register(stock, swapped, block_unfusable)
        else:
            register(stock, swapped, readout_unfusable, readout_unfusable=readout_unfusable)
        rule = RULES[stock]
    return rule.swapped


def _blank(stock: type[Module], mixin: type) -> Module:
    """What pickle and deepcopy fill: they can't find a class by name that has the name of the user's."""
    swapped = _combined(stock, mixin)
    return swapped.__new__(swapped)


class _Swapped(Mixin):
    """What the swapped classes share: pickled as the user's class and ours, to be combined again."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        mixin = next(mixin for mixin in (_Attention, _Block, _Classifier) if isinstance(self, mixin))
        stock = next(rule.stock for base in type(self).__mro__ if (rule := RULES.get(base)))
        return (_blank, (stock, mixin), *state)


class _Attention(_Swapped):
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x)
        elif not isinstance(self, _Attention):
            return type(self).forward(self, x)
        elif stock_wanted(x) or guards.attention_unfusable(self) is not None:
            return self._stock_forward(x)
        else:
            return attention_forward(self, x)


def block_unfusable(block: Part) -> str | None:
    drop_path = block._modules["drop_path"]
    idle = type(drop_path) in parts.IDENTITIES
    reason = parts.touched(drop_path) if idle else parts.unfusable(drop_path, parts.DROP_PATHS)
    if reason is not None:
        return f"drop_path {reason}"
    if not parts.plain_parameters(block):
        return "has a tensor subclass for a parameter"
    return guards.block_unfusable(block)


class _Block(_Swapped):
    readout_rows = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x)
        elif not isinstance(self, _Block):
            return type(self).forward(self, x)
        elif stock_wanted(x) or block_unfusable(self) is not None:
            return self._stock_forward(x)
        else:
            return _block_forward(self, x, rows_read(self))


def _block_forward(block: Part, x: Tensor, readout_rows: int) -> Tensor:
    """Here LayerScale's factors are the block's own, and one drop path serves both halves."""
    gammas = getattr(block, "gamma_1", None), getattr(block, "gamma_2", None)
    drop_path = block._modules["drop_path"]
    return both_branches(block, x, gammas, (drop_path, drop_path), readout_rows)


# Models: what they read after the last block ------------------------------------------------------------------------


def readout_unfusable(model: Part) -> str | None:
    """Why the last block is computed for all tokens in a call of the model, or None."""
    if not options.readout_wanted(model):
        return "readout=False"
    blocks = model._modules["blocks"]
    last = (
        next(reversed(blocks._modules.values()), None) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else None
    )
    if last is None or not hasattr(type(last), "readout_rows"):
        return f"the last block is a {parts.class_name(blocks if last is None else last)}"
    if "_deit_fast_rows" not in model.__dict__:
        model.__dict__["_deit_fast_rows"] = _rows_read(model, blocks)
    for name, module in (("sequence of blocks", blocks), ("last block", last), ("last norm", model._modules["norm"])):
        reason = parts.touched(module)
        if reason is not None:
            return f"the {name} {reason}"
    rule = next(rule for base in type(last).__mro__ if (rule := RULES.get(base)))
    reason = rule.unfusable(last)
    if reason is not None:
        return f"the last block: {reason}"
    return None if model.__dict__["_deit_fast_rows"] else "it reads more than one or two rows after the last block"


def _rows_read(model: Part, blocks: Part) -> int:
    """1 or 2 where the model's result needs no more than the first rows of the last block's, else 0.

    Found by calling it on one grey image, its blocks passed through and the last one's other rows NaN: its parts in
    evaluation, that nothing is drawn or counted, itself in evaluation and in training, where it may give more.
    """
    size = getattr(model._modules["patch_embed"], "img_size", None)
    parameter = next(model.parameters())
    if not isinstance(size, tuple) or torch.compiler.is_compiling():
        return 0
    image = torch.zeros(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
    *others, last = blocks._modules.values()
    modes = {module: module.training for module in model.modules()}

    def finite(rows: int, training: bool) -> bool:
        model.training = training
        last.forward = lambda x: torch.cat((x[:, :rows], torch.full_like(x[:, rows:], torch.nan)), 1)
        result = model._stock_forward(image)
        results = result if isinstance(result, tuple) else (result,)
        return all(isinstance(r, Tensor) and bool(torch.isfinite(r).all()) for r in results)

    try:
        for module in modes:
            module.training = False
        for block in others:
            block.forward = lambda x: x
        with torch.random.fork_rng(devices=()), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return next((rows for rows in (1, 2) if finite(rows, False) and finite(rows, True)), 0)
    except Exception:  # whatever a class that is not ours to know does with such an image
        return 0
    finally:
        for block in (*others, last):
            block.__dict__.pop("forward", None)
        for module, training in modes.items():
            module.training = training


class _Classifier(_Swapped):
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._stock_forward(x)
        elif not isinstance(self, _Classifier):
            return type(self).forward(self, x)
        elif stock_wanted(x) or readout_unfusable(self) is not None:
            return self._stock_forward(x)
        else:
            with reading(self.blocks[-1], self._deit_fast_rows):
                return self._stock_forward(x)


# What a class computes ----------------------------------------------------------------------------------------------


def _computes_attention(cls: type[Module]) -> bool:
    heads, scale = 2, 0.7  # a scale that no head width gives

    def formula(attn: Part, x: Tensor) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.softmax(scale * (q @ k.mT), dim=-1) @ v
        return attn.proj(out.transpose(1, 2).flatten(2))

    children = {
        "qkv": nn.Linear(_WIDTH, 3 * _WIDTH),
        "attn_drop": nn.Dropout(0.0),
        "proj": nn.Linear(_WIDTH, _WIDTH),
        "proj_drop": nn.Dropout(0.0),
    }
    return _agrees(cls, formula, children, {"num_heads": heads, "scale": scale})


class _Halve(Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def _computes_block(cls: type[Module], layer_scale: bool) -> bool:
    def formula(block: Part, x: Tensor) -> Tensor:
        gamma_1, gamma_2 = (block.gamma_1, block.gamma_2) if layer_scale else (1, 1)
        x = x + 0.5 * (gamma_1 * block.attn(block.norm1(x)))
        return x + 0.5 * (gamma_2 * block.mlp(block.norm2(x)))

    children = {name: nn.Linear(_WIDTH, _WIDTH) for name in ("norm1", "attn", "norm2", "mlp")}
    gammas = {name: nn.Parameter(torch.randn(_WIDTH)) for name in ("gamma_1", "gamma_2")} if layer_scale else {}
    return _agrees(cls, formula, {**children, "drop_path": _Halve()}, gammas)


def _agrees(cls: type[Module], formula: Callable[[Part, Tensor], Tensor], *attributes: dict[str, Any]) -> bool:
    """Whether `cls.forward` on a stand-in with these attributes, and no others, is the formula, in float64."""
    stand_in = cls.__new__(cls)
    Module.__init__(stand_in)
    for name, value in (item for group in attributes for item in group.items()):
        setattr(stand_in, name, value)
    stand_in.double()
    x = torch.randn(2, 5, _WIDTH, dtype=torch.float64)
    exact = formula(stand_in, x)
    for training in (False, True):
        try:
            result = stand_in.train(training)(x)
        except Exception:  # whatever a class that is not ours to know does without the attributes it wants
            return False
        if not isinstance(result, Tensor) or result.shape != x.shape or not torch.allclose(result, exact):
            return False
    return True
