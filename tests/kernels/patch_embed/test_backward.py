"""The launcher of the patch embedding's gradients against float64, beside PyTorch's own autograd."""

import pytest
import torch
from torch import Tensor

from deit_fast.kernels.launching import run
from deit_fast.kernels.patch_embed import patch_embed_backward
from deit_fast.ops.operator import OPERATORS
from reference.patch_embed import patch_embed as reference
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import BATCHES, DTYPES, randn, strided
from tests.support.guard import Guard

stock = OPERATORS["patch_embed"].stock
NAMES = ("images", "weight", "bias", "pos_embed", "cls_token", "dist_token", "mask_token", "mask", "mean", "std")
GRADIENTS = NAMES[:7]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def arguments_of(
    images: Tensor, width: int, patch: int, dtype: torch.dtype, *, prefix: int = 1, positions: str = "all", **others
) -> dict[str, Tensor | None]:
    """All parameters for `images`, in `dtype`; `others` replace or add to them."""
    channels = images.shape[1]
    patches = (images.shape[2] // patch) * (images.shape[3] // patch)
    rows = {"none": 0, "patches": patches, "all": prefix + patches}[positions]
    made = {
        "images": images,
        "weight": randn(width, channels, patch, patch, dtype=dtype, scale=(channels * patch * patch) ** -0.5),
        "bias": randn(width, dtype=dtype),
        "pos_embed": randn(1, rows, width, dtype=dtype) if rows else None,
        "cls_token": randn(1, 1, width, dtype=dtype) if prefix > 0 else None,
        "dist_token": randn(1, 1, width, dtype=dtype) if prefix > 1 else None,
    }
    return dict.fromkeys(NAMES) | made | others


def masked(batch: int, patches: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    mask = torch.rand(batch, patches) > 0.5
    mask[0] = True
    return {"mask": mask, "mask_token": randn(1, 1, width, dtype=dtype)}


def assert_right(
    arguments: dict[str, Tensor | None], grad: Tensor | None = None, wanted: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    """The wanted gradients are as accurate as stock's, and nothing outside them is written."""
    wanted = tuple(n for n in wanted if arguments[n] is not None and arguments[n].is_floating_point())
    tokens = stock(*arguments.values())
    grad = torch.randn(tokens.shape).to(tokens.dtype) if grad is None else grad

    def autograd(function, convert) -> list[Tensor]:
        inputs = {n: convert(x) for n, x in arguments.items()}
        for n in wanted:
            inputs[n].requires_grad_()
        return torch.autograd.grad(function(*inputs.values()), [inputs[n] for n in wanted], convert(grad))

    ours = backward(arguments, grad, wanted)
    theirs = autograd(stock, lambda x: x.clone() if isinstance(x, Tensor) else x)
    exact = autograd(reference, lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)
    for n, stock_gradient, truth in zip(wanted, theirs, exact, strict=True):
        assert_as_accurate_as_stock(ours[n], stock_gradient, truth, arguments[n].dtype, name=f"gradient of {n}")
    return ours


def backward(arguments: dict[str, Tensor | None], grad: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    guard = Guard()
    banded = [None if x is None else guard(x.detach(), n) for n, x in arguments.items()]
    with guard.outputs():
        found = patch_embed_backward(guard(grad, "grad"), *banded, [n in wanted for n in GRADIENTS])
    guard.assert_untouched()
    return dict(zip([n for n in GRADIENTS if n in wanted], found, strict=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kernels launched, and of how many programs."""
    seen, stock = [], run.run

    def record(kernel, programs, *args, **options):
        seen.append((kernel.__name__, programs))
        return stock(kernel, programs, *args, **options)

    monkeypatch.setattr(run, "run", record)
    return seen


@in_every_dtype
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("positions", ["none", "patches", "all"])
def test_prefix_tokens_and_both_kinds_of_positions(prefix, positions, dtype):
    images = randn(2, 3, 16, 24, dtype=dtype)
    assert_right(arguments_of(images, 64, 8, dtype, prefix=prefix, positions=positions))


def test_a_distillation_token_alone_is_the_first_row():
    images, token = torch.randn(2, 3, 16, 24), torch.randn(1, 1, 64)
    assert_right(arguments_of(images, 64, 8, torch.float32, cls_token=None, dist_token=token))


@in_every_dtype
@pytest.mark.parametrize(("width", "patch"), [(50, 4), (100, 14), (192, 16), (384, 8)])
def test_any_width_and_patch(width, patch, dtype):
    assert_right(arguments_of(randn(2, 3, patch, 2 * patch, dtype=dtype), width, patch, dtype))


@in_every_dtype
def test_patches_need_not_be_square(dtype):
    weight = randn(48, 3, 4, 8, dtype=dtype)
    assert_right(arguments_of(randn(2, 3, 16, 16, dtype=dtype), 48, 4, dtype, positions="none", weight=weight))


@in_every_dtype
@pytest.mark.parametrize("batch", [*BATCHES, 33])
@pytest.mark.parametrize("channels", [1, 4])
def test_any_batch_and_channels(batch, channels, dtype):
    arguments = arguments_of(randn(batch, channels, 8, 8, dtype=dtype), 48, 4, dtype, prefix=2)
    ours = assert_right(arguments)
    if batch == 0:
        assert not any(gradient.count_nonzero() for gradient in ours.values())


def test_an_empty_batch_launches_nothing(launches):
    assert_right(arguments_of(torch.empty(0, 3, 8, 8), 48, 4, torch.float32))
    assert not launches


@in_every_dtype
def test_an_image_may_be_one_patch(dtype):
    assert_right(arguments_of(randn(1, 3, 8, 8, dtype=dtype), 64, 8, dtype))


@in_every_dtype
@pytest.mark.parametrize("batch", [1, 2])
def test_the_rows_of_the_weight_gradient_are_split(batch, dtype, launches):
    images = randn(batch, 1, 112, 92, dtype=dtype)  # 644 patches: 2 splits, or 5, the last one shorter
    assert_right(arguments_of(images, 32, 4, dtype, positions="none"), wanted=("weight", "images"))
    splits = {1: 2, 2: 5}[batch]
    assert ("patch_weight_gradient_kernel", splits) in launches


@in_every_dtype
@pytest.mark.parametrize("prefix", [0, 2])
def test_masked_patches_have_no_gradient_but_the_mask_tokens(prefix, dtype):
    arguments = arguments_of(randn(3, 3, 16, 24, dtype=dtype), 64, 8, dtype, prefix=prefix)
    ours = assert_right(arguments | masked(3, 6, 64, dtype))
    assert not ours["images"][0].count_nonzero()


@in_every_dtype
def test_nan_gradients_of_masked_patches_reach_the_mask_token_alone(dtype):
    arguments = arguments_of(randn(2, 3, 16, 16, dtype=dtype), 32, 8, dtype) | masked(2, 4, 32, dtype)
    grad = randn(2, 5, 32, dtype=dtype)
    grad[0, 1:] = torch.nan
    ours = assert_right(arguments, grad)
    assert ours["mask_token"].isnan().all()
    assert all(ours[n].isfinite().all() for n in ("images", "weight", "bias", "cls_token"))


@in_every_dtype
def test_nan_and_infinity_go_where_float64_has_them(dtype):
    arguments = arguments_of(randn(2, 3, 16, 16, dtype=dtype), 32, 8, dtype) | masked(2, 4, 32, dtype)
    arguments["images"][0, 0, 0, 0], arguments["images"][1, 1, 9, 9] = torch.nan, torch.inf
    arguments["mask"][1] = False
    grad = randn(2, 5, 32, dtype=dtype)
    grad[1, 2, 3], grad[1, 0, 4] = torch.inf, -torch.inf
    assert_right(arguments, grad)


@in_every_dtype
def test_uint8_images_are_normalised_on_the_way_in(dtype):
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    ours = assert_right(arguments_of(images, 64, 8, dtype, mean=MEAN, std=STD))
    assert "images" not in ours


@in_every_dtype
def test_images_of_any_strides(dtype):
    images = randn(2, 3, 16, 24, dtype=dtype)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for view in (strided(images), channels_last, images[:1].expand(2, 3, 16, 24), images.transpose(2, 3)):
        ours = assert_right(arguments_of(view, 40, 8, dtype), wanted=("images", "weight"))
        assert ours["images"].stride() == torch.empty_like(view).stride()


@in_every_dtype
def test_parameters_and_gradients_of_any_strides(dtype):
    arguments = arguments_of(randn(2, 3, 16, 24, dtype=dtype), 40, 8, dtype, prefix=2) | masked(2, 6, 40, dtype)
    spread = {n: strided(x) for n, x in arguments.items() if x is not None}
    grad = randn(2, 8, 40, dtype=dtype)
    for view in (strided(grad), grad.mT.contiguous().mT, grad[:1].expand(2, 8, 40), grad[:1, :1, :1].expand(2, 8, 40)):
        assert_right(arguments | spread, view)
    channels_last = arguments["weight"].contiguous(memory_format=torch.channels_last)
    assert_right(arguments | {"weight": channels_last}, grad)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_autocast_mixes_a_low_weight_with_float32_all_else(low, pixels):
    images, normalisation = torch.randn(3, 3, 16, 24), {}
    if pixels == "uint8":
        images, normalisation = (images * 60 + 120).clamp(0, 255).to(torch.uint8), {"mean": MEAN, "std": STD}
    arguments = arguments_of(images, 64, 8, torch.float32, prefix=2, **normalisation)
    arguments |= masked(3, 6, 64, torch.float32) | {"weight": arguments["weight"].to(low)}
    ours = assert_right(arguments)
    assert ours["weight"].dtype is low and ours["bias"].dtype is torch.float32


@in_every_dtype
def test_gradients_are_the_same_bits_every_run(dtype):
    images = randn(2, 1, 112, 92, dtype=dtype)
    arguments = arguments_of(images, 32, 4, dtype, positions="none") | masked(2, 644, 32, dtype)
    grad, wanted = randn(2, 645, 32, dtype=dtype), ("images", "weight", "cls_token")
    first, second = (backward(arguments, grad, wanted) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in wanted)


def test_only_the_gradients_asked_for_are_computed(launches):
    arguments = arguments_of(torch.randn(2, 3, 16, 24), 64, 8, torch.float32, prefix=2)
    arguments |= masked(2, 6, 64, torch.float32)
    grad = torch.randn(2, 8, 64)
    everything = backward(arguments, grad, GRADIENTS)
    launched = {}
    for name in GRADIENTS:
        launches.clear()
        alone = backward(arguments, grad, (name,))
        assert alone.keys() == {name} and torch.equal(alone[name], everything[name])
        launched[name] = list(launches)
    sums, reduction = "token_gradients_kernel", ("sum_partials_kernel", 1)
    assert launched == {
        "images": [("image_gradient_kernel", 3)],
        "weight": [("patch_weight_gradient_kernel", 3)],
        "bias": [(sums, 6), reduction],
        "pos_embed": [(sums, 8)],
        "cls_token": [(sums, 2)],
        "dist_token": [(sums, 2)],
        "mask_token": [(sums, 6), reduction],
    }
