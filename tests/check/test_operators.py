"""Each output and gradient against float64 and stock: what passes, what fails, and what the truth is."""

from dataclasses import replace

import pytest
import torch

import reference
import reference.loss
from deit_fast import ops
from deit_fast.check.cases import DEIT_SIZES, INTERPRETER_SIZES, OPS, CheckCase, cases
from deit_fast.check.operators import compare, evaluate

CPU = torch.device("cpu")
IN_FLOAT64 = [(op, i) for op in OPS for i in range(len(list(cases(op, INTERPRETER_SIZES[0], torch.float32, CPU))))]


@pytest.mark.parametrize(
    ("ours", "again", "failure"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0], [1.0, 2.0000002], "other bits in a second run"),
        ([1.0, 2.1], [1.0, 2.1], "less accurate than stock: relative error 0.045 (stock 0, allowed"),
        ([1.0, torch.nan], [1.0, torch.nan], "other NaN or infinity than float64"),
        ([1.0], [1.0], "torch.float32 [1] where stock has torch.float32 [2]"),
    ],
)
def test_what_makes_a_line_fail(ours, again, failure):
    exact = torch.tensor([1.0, 2.0])
    found = compare(torch.tensor(ours), torch.tensor(again), exact, exact.double())
    assert found.get("failure") is failure or found["failure"].startswith(failure)


def test_infinity_is_right_where_float64_has_it_whatever_stock_has():
    exact = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    stock = torch.tensor([1.0, torch.nan])
    assert "failure" not in compare(exact.float(), exact.float(), stock, exact)
    assert compare(stock, stock, stock, exact)["failure"] == "other NaN or infinity than float64"


def test_indices_must_be_equal():
    right, wrong = torch.tensor([2, 0, 1]), torch.tensor([2, 1, 0])
    assert "failure" not in compare(right, right, right, right.double())
    assert "less accurate" in compare(wrong, wrong, right, right.double())["failure"]


def kept_block(x, norm_weight, norm_bias, eps, layer_scale, drop_path_scale, qkv_weight, qkv_bias, **rest):
    norm = (norm_weight, norm_bias, eps)
    qkv = reference.layer_norm_linear(x, *norm, qkv_weight, qkv_bias)
    heads = INTERPRETER_SIZES[0].heads
    out, _ = reference.attention(qkv.unflatten(-1, (3, heads, -1)), INTERPRETER_SIZES[0].scale)
    projection = rest.pop("proj_weight"), rest.pop("proj_bias")
    x = reference.linear_residual(out, *projection, x, layer_scale, drop_path_scale)
    y = reference.mlp(x, *norm, **rest, layer_scale=layer_scale, drop_path_scale=drop_path_scale)
    return ops.keep_samples(drop_path_scale), y


def reference_of(case: CheckCase):
    """The same in `reference/`, of the same named arguments; None where it has no counterpart."""
    if case.op == "readout_attention":

        def separate(weights, biases, **rest):
            if len(weights) == 1:
                weights, biases = weights[0].chunk(3), biases[0].chunk(3)
            names = ("q_weight", "k_weight", "v_weight"), ("q_bias", "k_bias", "v_bias")
            named = dict(zip(names[0], weights, strict=True)) | dict(zip(names[1], biases, strict=True))
            k_bias = named.pop("k_bias")
            out = reference.readout_attention(**named, **rest)
            return out + 0 * k_bias.sum(), rest["x"][:, : rest["readout_rows"]]

        return separate
    if case.op == "layer_norm_linear":

        def projected(weights, biases, kept=None, capacity=None, **rest):
            pairs = zip(weights, biases, strict=True)
            found = [reference.layer_norm_linear(**rest, weight=weight, bias=bias) for weight, bias in pairs]
            return (*found, rest["x"]) if case.title.startswith("and the residual") else tuple(found)

        return projected
    if case.op == "keep_samples":
        return kept_block if case.title.startswith("and a block") else ops.keep_samples
    if case.op == "attention":

        def without_log_sum_exp_gradient(qkv, scale, kept):
            q, k, v = qkv[0].unbind(2) if len(qkv) == 1 else qkv
            out, log_sum_exp = reference.attention_qkv(q, k, v, scale)
            return out, log_sum_exp.detach()

        return without_log_sum_exp_gradient
    if case.op == "layer_norm_fc1":

        def with_activated_as_data(kept=None, capacity=None, **rest):
            pre_activation, activated = reference.layer_norm_fc1(**rest)
            return pre_activation, activated.detach()

        return with_activated_as_data
    if case.op in ("linear_residual", "fc2_residual", "mlp"):
        return lambda kept, **rest: getattr(reference, case.op)(**rest)
    return reference.loss.distillation_loss if case.op == "distillation_loss" else getattr(reference, case.op)


@pytest.mark.parametrize(("op", "index"), IN_FLOAT64)
def test_its_truth_is_the_reference_in_float64(op, index):
    """`reference/` is not installed with the package: the stock operators answer for it, in float64."""
    case = list(cases(op, INTERPRETER_SIZES[0], torch.float32, CPU))[index]
    if op == "fc2_residual":
        # The reference computes it anew, in float64; the case's is rounded to float32.
        activated = torch.nn.functional.gelu(case.arguments["pre_activation"].detach().double())
        case = replace(case, arguments={**case.arguments, "activated": activated})
    found = evaluate(case, torch.float32, "torch", double=True)
    expected = evaluate(replace(case, function=reference_of(case)), torch.float32, "torch", double=True)
    assert list(found) == list(expected)
    for name, ours in found.items():
        assert ours.dtype is expected[name].dtype
        torch.testing.assert_close(ours, expected[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", DEIT_SIZES, ids=lambda size: str(size.width))
def test_the_cases_at_a_models_shapes_run(op, size):
    for case in cases(op, replace(size, batch=1), torch.bfloat16, CPU):
        found = evaluate(case, torch.bfloat16, "torch")
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert len(found) > len(case.differentiable)
