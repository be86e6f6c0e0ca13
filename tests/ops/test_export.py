"""Exported graphs: stock operators unless ours are asked for, and ours decomposed. The control is each stock form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import deit_fast
from deit_fast.ops import backend
from deit_fast.ops.drop_path import keep_samples
from deit_fast.ops.examples import Inputs, Size
from deit_fast.ops.operator import OPERATORS, Operator
from tests.support.examples import FORWARD, examples, tensors

SIZE = Size(batch=3, tokens=6, width=32, heads=1, head_dim=32, hidden=64, grid=(2, 2), patch=4, classes=7)


class Function(nn.Module):
    """`function` of these arguments, of which the tensors are what the module is called with."""

    def __init__(self, function: Callable, arguments: tuple) -> None:
        super().__init__()
        self.function = function
        self.leaves, self.spec = tree_flatten(arguments)

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def forward(self, *inputs: Tensor) -> object:
        given = iter(inputs)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return self.function(*tree_unflatten(leaves, self.spec))


class Leaves(Inputs):
    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return super().normal(*shape, scale=scale, mean=mean).requires_grad_()


def cases() -> dict[str, tuple]:
    """All arguments of every operator's examples, and of what they hand to the operators of their gradients."""
    found = examples(SIZE, Inputs(SIZE, torch.float32, torch.device("cpu")))

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "deit_fast" and function._opname not in FORWARD:
                found[f"{function._opname}, of {name}"] = tree_map_only(Tensor, Tensor.detach, args)
            return function(*args, **(kwargs or {}))

    for name, arguments in examples(SIZE, Leaves(SIZE, torch.float32, torch.device("cpu")), inference=False).items():
        wanted = [t for t in tensors(arguments) if t.requires_grad]
        if not wanted:
            continue
        with backend.forced("torch"), Log():
            outputs = operator_of(name)(*arguments)
            losses = [t.sum() for t in tree_leaves(outputs) if t.requires_grad]
            torch.autograd.grad(sum(losses), wanted, allow_unused=True)
    return found


def operator_of(name: str) -> Operator:
    return OPERATORS[name.partition(",")[0]]


CASES = cases()
of_every_operator = pytest.mark.parametrize("name", CASES)


def with_kept(name: str) -> tuple:
    """Its arguments, of which drop path keeps some samples, with room for all."""
    operator = operator_of(name)
    a = operator.Arguments(*CASES[name])
    scale = torch.tensor([1.5, 0.0, 1.5])
    given = {"kept": keep_samples(scale), "drop_path_scale": scale, "capacity": 3}
    return tuple(a._replace(**{key: value for key, value in given.items() if key in a._fields}))


WITH_KEPT = [name for name in CASES if "kept" in operator_of(name).Arguments._fields]


def exported(function: Callable, arguments: tuple, **options: object) -> torch.export.ExportedProgram:
    module = Function(function, arguments)
    with torch.no_grad():
        return torch.export.export(module, module.inputs(), **options)


def ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "deit_fast" in str(node.target)]


def answers(program: torch.export.ExportedProgram, arguments: tuple) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(program.module()(*Function(None, arguments).inputs()))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, stock in zip(found, expected, strict=True):
        assert (mine.shape, mine.dtype) == (stock.shape, stock.dtype)
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)


def test_every_operator_is_a_case() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(OPERATORS)


@of_every_operator
def test_run_decompositions_leaves_none_of_ours(name: str) -> None:
    operator, arguments = operator_of(name), CASES[name]
    program = exported(operator.op, arguments)
    assert ours(program) == [f"deit_fast.{operator.name}.default"]
    decomposed = program.run_decompositions()
    assert not ours(decomposed)
    with torch.no_grad():
        assert_same(answers(decomposed, arguments), tree_leaves(operator.stock(*arguments)))


@pytest.mark.parametrize("name", WITH_KEPT)
def test_dropped_samples_need_no_count_in_a_decomposed_graph(name: str) -> None:
    operator, arguments = operator_of(name), with_kept(name)
    decomposed = exported(operator.op, arguments).run_decompositions()
    assert not ours(decomposed)
    with torch.no_grad():
        expected = tree_leaves(operator.stock(*arguments))
    for mine, stock in zip(answers(decomposed, arguments), expected, strict=True):
        # What lies past the two kept samples is in no order, and the control may have no room for it.
        samples = 2 if mine.shape[0] == SIZE.batch else None
        assert_same([mine[:samples]], [stock[:samples]])


def test_a_table_says_what_is_decomposed() -> None:
    program = exported(OPERATORS["linear"].op, CASES["linear"])
    assert ours(program.run_decompositions({})) == ["deit_fast.linear.default"]
    table = torch.export.default_decompositions()
    del table[torch.ops.deit_fast.linear.default]
    assert ours(program.run_decompositions(table)) == ["deit_fast.linear.default"]
    table[torch.ops.deit_fast.linear.default] = lambda x, weight, bias, activation: x @ weight.T
    assert not ours(program.run_decompositions(table))


@pytest.mark.parametrize(
    ("name", "strict"),
    [(name, False) for name in CASES if operator_of(name).name in FORWARD] + [("linear", True), ("attention", True)],
)
def test_a_call_is_exported_as_its_stock_form_unless_ours_are_asked_for(name: str, strict: bool) -> None:
    operator, arguments = operator_of(name), CASES[name]
    program = exported(operator, arguments, strict=strict)
    assert not ours(program)
    assert_same(answers(program, arguments), tree_leaves(operator.stock(*arguments)))
    with deit_fast.fused_export():
        program = exported(operator, arguments, strict=strict)
    assert ours(program) == [f"deit_fast.{operator.name}.default"]
    assert_same(answers(program, arguments), tree_leaves(operator.stock(*arguments)))


def test_no_device_is_chosen_in_an_exported_attention() -> None:
    program = exported(OPERATORS["attention"], CASES["attention"])
    assert torch.ops.aten.scaled_dot_product_attention.default in [node.target for node in program.graph.nodes]
