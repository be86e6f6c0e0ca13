"""The original DeiT repository: models, blocks and attention whose classes are the user's own files.

No module can be named in advance, and the same names and layouts are found in many repositories with small changes.
So a class is recognised by its parts (names of children and parameters), by what its code reads (`swap.reading`): the
parts and nothing else that could change; and by what it computes: its forward is run once, on a tiny double-precision
stand-in, against the formula. Of a model a copy is run with NaN in the rows that a classifier should not read, anew
whenever something changed that its code reads. The swapped class is made on the spot.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from deit_fast.nn import guards, options, parts
from deit_fast.nn.forward import attention_forward, both_branches
from deit_fast.nn.parts import Part
from deit_fast.nn.readout import last_norm_unfusable, reading, rows_read, used_again
from deit_fast.swap.reading import State, only_computes, state_read
from deit_fast.swap.rules import RULES, Method, Rule, register, stock_wanted

_ATTENTION_PARTS = {"qkv", "attn_drop", "proj", "proj_drop"}
_BLOCK_PARTS = {"norm1", "attn", "drop_path", "norm2", "mlp"}
_BLOCK_SCALES = {"gamma_1", "gamma_2"}
_CLASSIFIER_PARTS = {"patch_embed", "blocks", "norm", "head"}
_WIDTH = 8
# The second is longer than any sequence of a DeiT: a formula may begin to differ somewhere.
_LENGTHS = (5, 600)
_NOT_RECOGNISED: set[type] = set()


def find_rule(cls: type[Module], module: Module) -> Rule | None:
    """The rule for a class seen for the first time, with a module of it; None if it is no block or attention."""
    if cls in _NOT_RECOGNISED:
        return None
    if len(inspect.signature(cls.forward).parameters) == 2:  # self and the tokens
        _recognise(cls, module._modules.keys(), module._parameters.keys())
    if cls not in RULES:
        _NOT_RECOGNISED.add(cls)
    return RULES.get(cls)


def _recognise(cls: type[Module], children: Set[str], parameters: Set[str]) -> None:
    """Makes the rule of `cls`, if it computes what it should."""
    with torch.random.fork_rng(devices=()), torch.device("cpu"), torch.no_grad():
        if children == _ATTENTION_PARTS and not parameters:
            if only_computes(cls.forward, _ATTENTION_PARTS | {"num_heads", "scale"}) and _computes_attention(cls):
                methods = {"forward": Method(_attention_call, attention_forward)}
                swapped = register(cls, attention_unfusable, methods, recognised=True)
                parts.add(parts.ATTENTIONS, swapped, stock=cls, recognised=True)
        elif children == _BLOCK_PARTS and (not parameters or parameters == _BLOCK_SCALES):
            if only_computes(cls.forward, _BLOCK_PARTS | parameters) and _computes_block(cls, bool(parameters)):
                methods = {"forward": Method(_block_call, _block_forward)}
                register(cls, block_unfusable, methods, recognised=True, readout_rows=None)
        elif children >= _CLASSIFIER_PARTS:
            methods = {"forward": Method(_classifier_call, _classifier_forward)}
            register(cls, readout_unfusable, methods, recognised=True, readout_unfusable=readout_unfusable)


def attention_unfusable(attn: Part) -> str | None:
    if "fused_attn" in attn.__dict__ or "head_dim" in attn.__dict__:
        return "has attributes of another library's attention"
    return guards.attention_unfusable(attn)


def _attention_call(attn: Part, x: Tensor) -> str | None:
    return stock_wanted(x) or attention_unfusable(attn)


def block_unfusable(block: Part) -> str | None:
    drop_path = block._modules["drop_path"]
    reason = None if parts.is_identity(drop_path) else parts.unfusable(drop_path, parts.DROP_PATHS)
    if reason is not None:
        return f"drop_path {reason}"
    if not parts.plain_parameters(block):
        return "has a tensor subclass for a parameter"
    return guards.block_unfusable(block)


def _block_call(block: Part, x: Tensor) -> str | None:
    return stock_wanted(x) or block_unfusable(block)


def _block_forward(block: Part, x: Tensor) -> Tensor:
    """Here LayerScale's factors are the block's own, and one drop path serves both halves."""
    gammas = getattr(block, "gamma_1", None), getattr(block, "gamma_2", None)
    drop_path = block._modules["drop_path"]
    return both_branches(block, x, gammas, (drop_path, drop_path), rows_read(block))


# Models: what they read after the last block ------------------------------------------------------------------------


class _Found(NamedTuple):
    """How many rows a model reads of its last block, 0 for all, as long as what its code reads is this."""

    rows: int
    state: State


def readout_unfusable(model: Part) -> str | None:
    """Why the last block is computed for all tokens in a call of the model, or None."""
    if not options.readout_wanted(model):
        return "readout=False"
    blocks = model._modules["blocks"]
    last = next(reversed(blocks._modules.values()), None) if type(blocks) in (nn.ModuleList, nn.Sequential) else None
    if last is None or not hasattr(type(last), "readout_rows") or type(last) not in RULES:
        return f"the last block is a {parts.class_name(blocks if last is None else last)}"
    rows = _rows_read(model)
    if used_again(blocks, last):
        return "the last block is used more than once"
    for name, module in (("sequence of blocks", blocks), ("last block", last)):
        reason = parts.touched(module)
        if reason is not None:
            return f"the {name} {reason}"
    reason = RULES[type(last)].unfusable(last)
    if reason is not None:
        return f"the last block: {reason}"
    if rows == 0:
        return "it reads more than one or two rows after the last block"
    return last_norm_unfusable(model._modules["norm"])


def _rows_read(model: Part) -> int:
    """1 or 2 where the model's result needs no more than the first rows of the last block's, else 0."""
    found = model.__dict__.get("_deit_fast_rows")
    if found is not None and found.state.holds(model):
        return found.rows
    if torch.compiler.is_compiling() or any(parameter.is_meta for parameter in model.parameters()):
        return 0
    state = state_read(model._deit_fast_stock.forward, model)
    rows = 0
    if state.complete:
        with torch.random.fork_rng(devices=()), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = next((n for n in (1, 2) if all(_reads_no_more(model, n, mode) for mode in (False, True))), 0)
    model.__dict__["_deit_fast_rows"] = _Found(rows, state)
    return rows


class _Pass(Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class _Cut(Module):
    """The last block's stand-in: past its first rows it gives NaN. It notes who else would be given all rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.called, self.given_all = rows, False, False

    def forward(self, x: Tensor) -> Tensor:
        self.called, self.draws = True, torch.get_rng_state()
        return torch.cat((x[:, : self.rows], torch.full_like(x[:, self.rows :], torch.nan)), 1)

    def note(self, module: Module, arguments: tuple[Any, ...]) -> None:
        """A hook of the modules other than the last norm: what they do with the other rows may be seen or drawn."""
        if self.called and any(isinstance(each, Tensor) and each.ndim > 2 for each in arguments):
            self.given_all = True


def _reads_no_more(model: Part, rows: int, training: bool) -> bool:
    """Whether one grey image's result needs `rows` rows of the last block: a copy is called, without its blocks."""
    size = getattr(model._modules["patch_embed"], "img_size", None)
    if not isinstance(size, tuple):
        return False
    last = _Cut(rows)
    try:
        twin = _copy(model, last)
        twin.training = training
        result = model._deit_fast_stock.forward(twin, torch.zeros(1, 3, *size, dtype=next(twin.parameters()).dtype))
    except Exception:  # whatever a class that is not ours to know does with such an image
        return False
    results = result if isinstance(result, tuple) else (result,)
    finite = all(isinstance(each, Tensor) and bool(torch.isfinite(each).all()) for each in results)
    return finite and not last.given_all and torch.equal(torch.get_rng_state(), last.draws)


def _copy(model: Part, last: _Cut) -> Part:
    """On the CPU, its parts in evaluation that nothing is drawn or counted, its blocks passed through."""
    stock = model._deit_fast_stock
    twin: Any = stock.__new__(stock)
    twin.__dict__.update(model.__dict__)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {k: None if t is None else t.detach().cpu() for k, t in model.__dict__[kind].items()}
    modules: dict[str, Module | None] = {}
    for name, child in model._modules.items():
        if name == "blocks":
            blocks = [_Pass() for _ in child][:-1]
            modules[name] = (
                nn.Sequential(*blocks, last) if type(child) is nn.Sequential else nn.ModuleList([*blocks, last])
            )
        elif child is not None:
            modules[name] = part = _without_hooks(copy.deepcopy(child).cpu().eval())
            if name not in ("norm", "patch_embed"):
                part.register_forward_pre_hook(last.note)
    twin.__dict__["_modules"] = modules
    return twin


def _without_hooks(module: Module) -> Module:
    for each in module.modules():
        each._forward_hooks.clear()
        each._forward_pre_hooks.clear()
    return module


def _classifier_call(model: Part, x: Tensor) -> str | None:
    return stock_wanted(x) or readout_unfusable(model)


def _classifier_forward(model: Part, x: Tensor) -> Any:
    with reading(model.blocks[-1], model._deit_fast_rows.rows):
        return model._deit_fast_stock.forward(model, x)


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
    for length in _LENGTHS:
        x = torch.randn(2, length, _WIDTH, dtype=torch.float64)
        exact = formula(stand_in, x)
        for training in (False, True):
            try:
                result = stand_in.train(training)(x)
            except Exception:  # whatever a class that is not ours to know does without the attributes it wants
                return False
            if not isinstance(result, Tensor) or result.shape != x.shape or not torch.allclose(result, exact):
                return False
    return True
