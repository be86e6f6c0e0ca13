"""Tensors of more than 2³¹ elements: the last program of each launch finds its place, and what it finds there is right.

A case has the arguments for any number of samples, of which only the last few hold anything but zeros. What the last
programs of a huge launch make of them is what an ordinary launch makes of those samples alone.
"""

import importlib
import pkgutil
import re
from inspect import getsource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deit_fast import kernels
from deit_fast.kernels import attention, drop_path, layer_norm, linear, loss, mlp, patch_embed, readout
from deit_fast.kernels import pixels as pixels_kernels
from deit_fast.kernels.launching import hardware
from deit_fast.kernels.launching.settings import Tile
from deit_fast.kernels.layer_norm.backward import layer_norm_input_gradient, layer_norm_parameter_gradients
from deit_fast.kernels.layer_norm.settings import COLUMN_SUMS
from deit_fast.kernels.linear import vendor_gemm
from deit_fast.kernels.linear.branch_gradient import branch_gradient
from deit_fast.kernels.linear.input_gradient import input_gradient
from deit_fast.kernels.linear.parameter_gradients import (
    layer_norm_linear_parameter_gradients,
    linear_parameter_gradients,
)
from tests.support import huge

EPS = 1e-6
DTYPE = torch.float16
LIMIT = 2**31
# The last 16 rows are a program's, of one sample alone as of many, whatever a tile's rows.
TOKENS = 272


@pytest.fixture(autouse=True)
def no_product_is_the_vendors(monkeypatch):
    """On a CPU it would touch the whole of a huge tensor."""
    monkeypatch.setattr(linear.settings, "vendor", lambda *_: False)


def tail(shape: tuple[int, ...], dtype: torch.dtype = DTYPE, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def filled(samples: int, last: Tensor) -> Tensor:
    """`samples` samples, `last` the last of them, zeros before."""
    x = huge.zeros((samples, *last.shape[1:]), last.dtype)
    x[-len(last) :] = last
    return x


def samples_of(elements: int) -> int:
    """How many samples of `elements` pass the limit; one more than a multiple of 8, so that a last tile isn't full."""
    return LIMIT // elements // 8 * 8 + 9


def whole_kept(samples: int, last: int) -> Tensor:
    """Every sample kept; only the last entries are there to be read."""
    kept = huge.zeros((1 + samples,), torch.int32)
    kept[0] = samples
    kept[-last:] = torch.arange(samples - last, samples)
    return kept


def assert_same(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert expected.any(), "nothing but zeros would be found anywhere"
    assert torch.equal(found, expected), name


# Rows -------------------------------------------------------------------------------------------------------------


def test_layer_norm():
    last, weight = tail((1, TOKENS, 64)), tail((64,))
    x = filled(samples_of(TOKENS * 64), last)
    with huge.last_programs(1) as names:
        y = layer_norm.layer_norm(x, weight, weight, EPS)
        total, z = layer_norm.add_layer_norm(x, x, weight, weight, EPS)
    assert names == ["layer_norm_kernel"] * 2
    assert_same(y[-1, -16:], layer_norm.layer_norm(last, weight, weight, EPS)[-1, -16:])
    for found, expected in zip((total, z), layer_norm.add_layer_norm(last, last, weight, weight, EPS), strict=True):
        assert_same(found[-1, -16:], expected[-1, -16:])


@pytest.mark.parametrize("with_kept", [False, True])
def test_layer_norm_backward(with_kept):
    grad, last, weight = tail((1, TOKENS, 64)), tail((1, TOKENS, 64)), tail((64,))
    samples = samples_of(TOKENS * 64)
    x, kept = filled(samples, last), whole_kept(samples, 1) if with_kept else None
    with huge.last_programs(1) as names:
        found = layer_norm_input_gradient(
            filled(samples, grad), x, weight, EPS, residual_grad=x, kept=kept, normalised_dtype=DTYPE
        )
    assert names == ["layer_norm_backward_kernel"]
    expected = layer_norm_input_gradient(grad, last, weight, EPS, residual_grad=last, normalised_dtype=DTYPE)
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine[-1, -16:], other[-1, -16:])


def test_sums_over_rows():
    """The last columns' sums over the last rows; over all others they are 0."""
    width, rows = 1024, LIMIT // 1024 + COLUMN_SUMS.depth
    grad, last = tail((COLUMN_SUMS.depth, width)), tail((COLUMN_SUMS.depth, width))
    mean, rstd = last.float().mean(1), last.float().var(1).rsqrt()
    with huge.last_programs(1) as names:
        found = layer_norm_parameter_gradients(*(filled(rows, t) for t in (grad, last, mean, rstd)), DTYPE)
    assert names == ["column_sums_kernel", "sum_splits_kernel"]
    expected = layer_norm_parameter_gradients(grad, last, mean, rstd, DTYPE)
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine[-COLUMN_SUMS.columns :], other[-COLUMN_SUMS.columns :])


# Products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_kept", [False, True])
def test_layer_norm_linear(with_kept):
    last, weight, bias = tail((1, TOKENS, 64)), tail((64, 64), scale=0.125), tail((64,))
    samples = samples_of(TOKENS * 64)
    kept = whole_kept(samples, 1) if with_kept else None
    with huge.last_programs(1) as names:
        (y,) = linear.layer_norm_linear(filled(samples, last), bias, bias, EPS, [weight], [bias], kept)
    assert names == ["layer_norm_kernel", "linear_kernel"]
    assert_same(y[-1, -16:], linear.layer_norm_linear(last, bias, bias, EPS, [weight], [bias])[0][-1, -16:])


def test_linear_by_persistent_programs(monkeypatch):
    monkeypatch.setattr(linear.settings, "persistent", lambda *_: True)
    # A program takes one tile, or the last would take its share of them all.
    monkeypatch.setattr(hardware, "multiprocessors", lambda _: LIMIT)
    x, residual = tail((1, TOKENS, 64)), tail((1, TOKENS, 64))
    weight, bias, factors = tail((64, 64), scale=0.125), tail((64,)), tail((1,))
    samples = samples_of(TOKENS * 64)
    with huge.last_programs(1) as names:
        y = linear.linear_residual(
            filled(samples, x), weight, bias, filled(samples, residual), bias, filled(samples, factors)
        )
    assert names == ["persistent_linear_kernel"]
    assert_same(y[-1, -16:], linear.linear_residual(x, weight, bias, residual, bias, factors)[-1, -16:])


def test_layer_norm_qkv():
    last, weight, bias = tail((1, TOKENS, 64)), tail((64, 64), scale=0.125), tail((64,))
    projections = [weight] * 3, [bias] * 3
    with huge.last_programs(3) as names:
        found = linear.layer_norm_linear(filled(samples_of(TOKENS * 64), last), bias, bias, EPS, *projections)
    assert names == ["layer_norm_kernel", "linear_kernel"]
    # The last three programs are not all of the last row tile's; v's is among them.
    assert_same(found[2][-1, -16:], linear.layer_norm_linear(last, bias, bias, EPS, *projections)[2][-1, -16:])


@pytest.mark.parametrize("with_kept", [False, True])
def test_linear_residual(with_kept):
    x, residual = tail((1, TOKENS, 64)), tail((1, TOKENS, 64))
    weight, bias, factors = tail((64, 64), scale=0.125), tail((64,)), tail((1,))
    samples = samples_of(TOKENS * 64)
    kept = whole_kept(samples, 1) if with_kept else None
    with huge.last_programs(1) as names:
        y = linear.linear_residual(
            filled(samples, x), weight, bias, filled(samples, residual), bias, filled(samples, factors), kept
        )
    assert names == ["linear_kernel"]
    expected = linear.linear_residual(x, weight, bias, residual, bias, factors)
    assert_same(y[-1, -16:], expected[-1, -16:])


def test_what_follows_the_vendors_gemm(monkeypatch):
    product, residual, factors = tail((1, TOKENS, 64)), tail((1, TOKENS, 64)), tail((1,))
    weight, bias = tail((64, 64)), tail((64,))

    def multiply(name, a, b, out, plus=None):
        out[-TOKENS:] = product.view(TOKENS, 64)

    def finished(samples: int) -> tuple[Tensor, list[str]]:
        rows = filled(samples, residual).view(-1, 64)
        monkeypatch.setattr(vendor_gemm, "multiply", multiply)
        with huge.last_programs(1) as names:
            y = torch.empty((len(rows), 64), dtype=DTYPE)
            scales = bias, filled(samples, factors)
            vendor_gemm.linear(rows, y, weight, bias, "none", None, rows, *scales, TOKENS)
        return y, names

    y, names = finished(samples_of(TOKENS * 64))
    assert names == ["epilogue_kernel"]
    assert_same(y[-16:], finished(1)[0][-16:])

    def differentiated(samples: int) -> tuple[Tensor, Tensor, list[str]]:
        x, dx, activated = filled(samples, residual), *(torch.empty((samples, TOKENS, 64), dtype=DTYPE) for _ in "ab")
        monkeypatch.setattr(vendor_gemm, "multiply", multiply)
        with huge.last_programs(1) as names:
            vendor_gemm.input_gradient((x,), (weight,), dx, None, x.view(-1, 64), "gelu", activated, TOKENS, None)
        return dx, activated, names

    dx, activated, names = differentiated(samples_of(TOKENS * 64))
    assert names == ["input_gradient_epilogue_kernel"]
    for found, expected in zip((dx, activated), differentiated(1), strict=False):
        assert_same(found[-1, -16:], expected[-1, -16:])


def test_mlp(monkeypatch):
    monkeypatch.setattr(mlp, "fits", lambda *_: True)
    x, fc1, fc2 = tail((1, TOKENS, 64)), tail((96, 64), scale=0.125), tail((64, 96), scale=0.1)
    bias, factors = tail((64,)), tail((1,))
    samples = samples_of(TOKENS * 64)

    def run(x, factors):
        return mlp.mlp(x, bias, bias, EPS, fc1, None, fc2, bias, bias, factors, "gelu")

    with huge.last_programs(1) as names:
        y = run(filled(samples, x), filled(samples, factors))
    assert names == ["mlp_kernel"]
    assert_same(y[-1, -16:], run(x, factors)[-1, -16:])


@pytest.mark.parametrize("with_kept", [False, True])
def test_gradient_of_a_linear_layers_input(with_kept):
    grad, x, weight = tail((1, TOKENS, 64)), tail((1, TOKENS, 64)), tail((64, 64), scale=0.125)
    samples = samples_of(TOKENS * 64)
    kept = whole_kept(samples, 1) if with_kept else None
    with huge.last_programs(1) as names:
        found = input_gradient(
            [filled(samples, grad)], [weight], gelu_of=filled(samples, x), activation="gelu", need_activated=True,
            kept=kept,
        )  # fmt: skip
    assert names == ["input_gradient_kernel"]
    expected = input_gradient([grad], [weight], gelu_of=x, activation="gelu", need_activated=True)
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine[-1, -16:], other[-1, -16:])
    with huge.last_programs(1):
        dx, _ = input_gradient([filled(samples, grad)] * 3, [weight] * 3)
    assert_same(dx[-1, -16:], input_gradient([grad] * 3, [weight] * 3)[0][-1, -16:])


@pytest.mark.parametrize("with_kept", [False, True])
def test_gradient_of_a_branch(with_kept):
    grad, factors = tail((1, TOKENS, 64)), tail((1,))
    samples = samples_of(TOKENS * 64)
    kept = whole_kept(samples, 1) if with_kept else None
    with huge.last_programs(1) as names:
        y = branch_gradient(filled(samples, grad), filled(samples, factors), kept, samples, DTYPE)
    assert names == ["branch_gradient_kernel"]
    assert_same(y[-1, -16:], branch_gradient(grad, factors, None, 1, DTYPE)[-1, -16:])


def test_gradients_of_a_linear_layers_parameters(monkeypatch):
    """The last output features' over the last rows; over all others they are 0. Their partial sums are huge as well."""
    monkeypatch.setattr(linear.settings, "splits", lambda *_: 32)
    features, rows = 8192, LIMIT // 8192 + 64
    grad, last = tail((64, features)), tail((64, features))
    weight, bias = huge.zeros((features, features), DTYPE), tail((features,))
    with huge.last_programs(2) as names:
        found = linear_parameter_gradients(filled(rows, grad), filled(rows, last), weight, bias)
    assert names == ["weight_gradient_kernel", "finish_linear_kernel"]
    expected = linear_parameter_gradients(grad[:, -128:], last[:, -128:], weight[:128, :128], bias[-128:])
    assert_same(found[0][-4:, -128:], expected[0][-4:])
    assert_same(found[1][-4:], expected[1][-4:])


def test_gradients_of_the_parameters_of_a_layer_norm_and_a_linear_layer(monkeypatch):
    monkeypatch.setattr(linear.settings, "splits", lambda *_: 32)
    features, rows = 8192, LIMIT // 8192 + 64
    grad, last = tail((64, features)), tail((64, features))
    weight, bias = huge.zeros((features, features), DTYPE), tail((features,))
    with huge.last_programs(2) as names:
        found = layer_norm_linear_parameter_gradients(
            [filled(rows, grad)], filled(rows, last), bias, None, [weight], [bias]
        )
    assert names == ["weight_gradient_kernel", "finish_layer_norm_linear_kernel"]
    expected = layer_norm_linear_parameter_gradients(
        [grad[:, -128:]], last[:, -128:], bias[-128:], None, [weight[:128, :128]], [bias[-128:]]
    )
    assert_same(found[2][-128:, -8:], expected[2][:, -8:])


# Attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_kept", [False, True])
def test_attention(with_kept):
    last = tail((1, 17, 3, 1, 64))
    samples = samples_of(17 * 64)
    kept = whole_kept(samples, 1) if with_kept else None
    with huge.last_programs(1) as names:
        out, log_sum_exp = attention.attention([filled(samples, last)], 0.125, kept)
    assert names == ["attention_kernel"]
    expected = attention.attention([last], 0.125)
    assert_same(out[-1:], expected[0])
    assert_same(log_sum_exp[-1:], expected[1])


@pytest.mark.parametrize("with_kept", [False, True])
def test_gradients_of_attention(with_kept):
    last, grad = tail((1, 17, 3, 1, 64)), tail((1, 17, 64))
    samples = samples_of(17 * 64)
    out, log_sum_exp = attention.attention([last], 0.125)
    kept = whole_kept(samples, 1) if with_kept else None

    def run(grad, qkv, out, log_sum_exp, kept=None):
        (dqkv,) = attention.attention_backward(grad, [qkv], out, log_sum_exp, 0.125, kept)
        return dqkv

    with huge.last_programs(1) as names:
        inputs = [filled(samples, t) for t in (grad, last, out, log_sum_exp)]
        found = run(*inputs, kept)
    assert names == ["query_gradient_kernel", "key_gradient_kernel"]
    assert_same(found[-1:], run(grad, last, out, log_sum_exp))


def test_readout():
    last, absorbed = tail((1, 17, 64)), tail((1, 2, 3, 64), scale=0.1)
    samples = samples_of(2 * 3 * 64)
    with huge.last_programs(1) as names:
        found = readout.readout(filled(samples, last), filled(samples, absorbed), None, EPS, DTYPE)
    assert names == ["readout_kernel"]
    for mine, expected in zip(found, readout.readout(last, absorbed, None, EPS, DTYPE), strict=True):
        assert_same(mine[-1:], expected)


def test_gradients_of_readout():
    """Of the last tokens of the last image, which has more than 2²⁴."""
    tokens = readout.settings.readout_backward(64, 16, 2, "sm_90").tokens
    last, absorbed, weight = tail((1, tokens, 64)), tail((3, 2, 3, 64), scale=0.1), tail((64,))
    summed, dsummed = tail((3, 2, 3, 64), torch.float32), tail((3, 2, 3, 64), torch.float32)
    log_sum_exp = torch.full((3, 2, 3), 2.0)
    x = huge.zeros((3, 2**24, 64), DTYPE)
    x[-1:, -tokens:] = last
    with huge.last_programs(1) as names:
        dx, dabsorbed = readout.readout_backward(x, absorbed, weight, EPS, summed, log_sum_exp, dsummed, DTYPE)
    assert names == ["readout_backward_kernel"]
    expected = readout.readout_backward(
        last, absorbed[-1:], weight, EPS, summed[-1:], log_sum_exp[-1:], dsummed[-1:], DTYPE
    )
    assert_same(dx[-1, -tokens:], expected[0][0])
    assert_same(dabsorbed[-1:], expected[1])


# Images -----------------------------------------------------------------------------------------------------------


def patches_of(images: Tensor, weight: Tensor, token: Tensor | None) -> Tensor:
    return patch_embed.patch_embed(images, weight, None, None, token, None, None, None, None, None)


def test_patch_embed():
    last, weight, token = tail((2, 3, 16, 16)), tail((64, 3, 8, 8), scale=0.07), tail((1, 1, 64))
    images = filled(samples_of(4 * 64), last)
    with huge.last_programs(1) as names:
        patches, prefix = patches_of(images, weight, None), patches_of(images, weight, token)
    assert names == ["patch_embed_kernel"] * 2
    assert_same(patches[-1], patches_of(last, weight, None)[-1])
    assert_same(prefix[-1, 0], token[0, 0])


def test_patch_embed_of_images_in_the_last_dimension():
    """An offset within a patch is then what is large."""
    samples = LIMIT // (7 * 16) // 128 * 128 + 128 + 32
    last, weight = tail((32, 3, 16, 16)), tail((64, 3, 8, 8), scale=0.07)
    images = huge.zeros((3, 16, 16, samples), DTYPE).permute(3, 0, 1, 2)
    images[-32:] = last
    with huge.last_programs(1):
        patches = patches_of(images, weight, None)
    assert_same(patches[-1], patches_of(last, weight, None)[-1])


@pytest.mark.parametrize("last_dimension", ["columns", "images"])
def test_gradients_of_patches(last_dimension, monkeypatch):
    """Of the last features over the last images, and of the last image."""
    monkeypatch.setattr(patch_embed.settings, "patch_embed_weight_gradient", lambda *_: (Tile(64, 128, 32, 8, 2), 1024))
    width = depth = 3072
    last, grad, weight = tail((32, 3, 32, 32)), tail((32, 1, width)), tail((width, 3, 32, 32), scale=0.02)
    if last_dimension == "columns":
        samples = LIMIT // depth // 1024 * 1024 + 1024 + 32
        images = filled(samples, last)
    else:
        # An offset within a patch is then what is large.
        samples = LIMIT // (31 * 32) // 1024 * 1024 + 1024 + 32
        images = huge.zeros((3, 32, 32, samples), DTYPE).permute(3, 0, 1, 2)
        images[-32:] = last

    def run(grad, images, weight):
        needs = [True, True, False, False, False, False, False]
        parameters = (weight, *[None] * 8)
        return patch_embed.patch_embed_backward(grad, images, *parameters, needs)

    with huge.last_programs(1) as names:
        of_images, of_weight = run(filled(samples, grad), images, weight)
    assert names == ["patch_weight_gradient_kernel", "sum_partials_kernel", "image_gradient_kernel"]
    with huge.last_programs(1):
        expected_of_images, expected_of_weight = run(grad, last, weight)
    assert_same(of_weight.flatten()[-64:], expected_of_weight.flatten()[-64:])
    assert_same(of_images[-1].flatten()[-64:], expected_of_images[-1].flatten()[-64:])


def test_normalised_pixels():
    """Of the last image and its partner, which is the first."""
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    images[0] = 0
    erased = torch.tensor([[[0] * 5], [[3, 4, 5, 6, 2]]], dtype=torch.int32)
    boxes, shares = torch.tensor([[0] * 4, [9, 0, 7, 5]], dtype=torch.int32), tail((2, 2), torch.float32)
    mean, noise = tail((3,), torch.float32), tail((100,), torch.float32)

    def pixels(images: Tensor, erased: Tensor, shares: Tensor, boxes: Tensor) -> Tensor:
        return pixels_kernels.normalise_pixels(images, mean, mean.exp(), DTYPE, erased, noise, shares, boxes)

    samples, given = samples_of(images[0].numel()), (images, erased, shares, boxes)
    with huge.last_programs(3) as names:
        found = pixels(*(filled(samples, each[1:]) for each in given))
    assert names == ["normalise_pixels_kernel"]
    assert_same(found[-1], pixels(*given)[-1])


def test_gradients_of_tokens(monkeypatch):
    """Of the last of more than 2²¹ positions, 1024 wide; and what it adds to the bias's."""
    monkeypatch.setattr(patch_embed.token_gradients, "sum_partials", lambda partials, total: total.copy_(partials[-1]))
    patches, width = 2**21 + 2, 1024
    grad = huge.zeros((1, patches + 1, width), DTYPE)
    grad[0, -1] = tail((width,))
    pixels, weight = huge.zeros((1, 1, 1, patches), DTYPE), tail((width, 1, 1, 1))
    pos_embed, token = huge.zeros((1, patches, width), DTYPE), tail((1, 1, width))
    needs = [False, False, True, True, False, False, False]
    with huge.last_programs(1) as names:
        of_bias, of_pos_embed = patch_embed.patch_embed_backward(
            grad, pixels, weight, tail((width,)), pos_embed, token, *[None] * 5, needs
        )
    assert names == ["token_gradients_kernel"]
    assert_same(of_pos_embed[0, -1, -64:], grad[0, -1, -64:])
    assert_same(of_bias[-64:], grad[0, -1, -64:])


# What has a program for all, or a sample each ---------------------------------------------------------------------


def test_distillation_loss():
    samples = LIMIT // 1000 + 100
    heads = [tail((1, 1000)) for _ in range(3)]
    logits, dist_logits, teacher = (filled(samples, t) for t in heads)
    labels = huge.zeros((samples,), torch.int64)
    labels[-1] = 7
    options = ("soft", 0.5, 2.0, 0.1, None, [True, True])
    with huge.last_programs(1) as names:
        _, *gradients = loss.distillation_loss(logits, dist_logits, labels, teacher, *options)
    assert names == ["distillation_loss_kernel"]
    _, *expected = loss.distillation_loss(heads[0], heads[1], labels[-1:], heads[2], *options)
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine[-1:] * samples, other, rtol=1e-5, atol=0)


def test_more_samples_than_a_grid_axis_has_programs():
    """Drop path's samples are counted by one program."""
    factors = torch.zeros(70_000)
    factors[[3, 65_536, 69_999]] = 1.25
    kept = drop_path.keep_samples(factors)
    assert kept[:4].tolist() == [3, 3, 65_536, 69_999]
    assert kept[-1] == 69_998


def test_every_kernel_is_launched_here():
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "deit_fast.kernels.")]
    there = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    # Of a batch's flags, and of one weight: never so large.
    small = {"keep_samples_kernel", "scaled_weight_kernel"}
    named = set(re.findall(r"\w+_kernel\b", Path(__file__).read_text())) | small
    assert there and there <= named


def test_launches_use_the_first_axis_of_the_grid_alone():
    """The others end at 65,535 programs."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "deit_fast.kernels.")]
    source = "".join(map(getsource, modules))
    assert set(re.findall(r"(?:program_id|num_programs)\((\w+)\)", source)) == {"0"}
    assert re.findall(r"\bkernel\[(\(.*\))\]\)\(\*args", source) == ["(programs,)"]
    assert re.findall(r"\bstart_\{i\}\((.*), stream", source) == ["{programs}, 1, 1"]
    assert not re.search(r"_kernel\[", source)
