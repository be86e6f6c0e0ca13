"""Training with stochastic depth: swapped models follow stock from one seed, and skip what it drops."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deit_fast
from deit_fast.ops import backend
from deit_fast.swap import restore, swap
from tests.support.accuracy import errors
from tests.swap.helpers import TOLERANCE, assert_close, assert_same_gradients, operator_calls, randomise

timm = pytest.importorskip("timm")
from timm.layers import DropPath  # noqa: E402
from timm.models import deit, vision_transformer  # noqa: E402

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 10}
MODELS = {
    "deit": (vision_transformer.VisionTransformer, {}),
    "distilled": (deit.VisionTransformerDistilled, {}),
    "deit3": (vision_transformer.VisionTransformer, {"init_values": 0.1, "no_embed_class": True}),
}


def build(name: str = "deit", rate: float = 0.5, **options) -> nn.Module:
    """A small one in training mode, drop path in every block."""
    kind, own = MODELS[name]
    model = kind(drop_path_rate=0.1, **SIZES | own | options)
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return randomise(model).train()


def set_rate(model: nn.Module, rate: float) -> None:
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = rate


def step(model: nn.Module, x: Tensor, seed: int = 3) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The output, every parameter's gradient, and what the generator gives next."""
    torch.manual_seed(seed)
    out = model(x)
    loss = (out * torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)).sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach(), found, torch.rand(1)


def assert_steps_agree(result: tuple, expected: tuple) -> None:
    (out, found, after), (stock_out, stock_found, stock_after) = result, expected
    assert_close(out, stock_out)
    assert torch.equal(after, stock_after)
    zero = {name for name, gradient in stock_found.items() if not gradient.any()}
    assert found.keys() == stock_found.keys()
    assert not any(found[name].any() for name in zero)
    others = stock_found.keys() - zero
    assert_same_gradients({n: found[n] for n in others}, {n: stock_found[n] for n in others})


def assert_follows_stock(model: nn.Module, x: Tensor, **options) -> None:
    expected = step(model, x)
    assert not swap(model, **options).kept
    assert_steps_agree(step(model, x), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1 - 1e-7, 1.0])
def test_outputs_gradients_and_the_generator_follow_stock(name, rate) -> None:
    assert_follows_stock(build(name, rate), torch.randn(6, 3, 32, 32))


@pytest.mark.parametrize("options", [{"memory": "low"}, {"readout": False}, {"compact_drop_path": True}])
def test_no_option_of_the_swap_changes_a_value(options) -> None:
    assert_follows_stock(build("deit3"), torch.randn(6, 3, 32, 32), **options)


@pytest.fixture
def keep(monkeypatch) -> Callable[[list[int]], None]:
    """Sets which samples every drop path keeps from here on."""

    def choose(samples: list[int]) -> None:
        def bernoulli_(mask: Tensor, probability: float) -> Tensor:
            mask.zero_().view(-1)[samples] = 1.0
            return mask

        monkeypatch.setattr(Tensor, "bernoulli_", bernoulli_)

    return choose


@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize(("batch", "samples"), [(1, []), (1, [0]), (4, []), (4, [2]), (4, [0, 1, 2, 3])])
def test_any_number_of_kept_samples_follows_stock(keep, batch, samples, memory) -> None:
    keep(samples)
    assert_follows_stock(build("deit3"), torch.randn(batch, 3, 32, 32), memory=memory)


def test_where_all_samples_are_dropped_gradients_are_zero_and_not_none(keep) -> None:
    model = build()
    swap(model)
    keep([])
    _, found, _ = step(model, torch.randn(4, 3, 32, 32))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for name, g in found.items() if name.startswith("blocks."))
    assert found["cls_token"].any()


def test_a_batch_of_no_images_follows_stock() -> None:
    assert_follows_stock(build(), torch.randn(0, 3, 32, 32))


def test_the_rate_may_change_from_step_to_step() -> None:
    model, x = build(), torch.randn(6, 3, 32, 32)
    twin = copy.deepcopy(model)
    swap(twin)
    for seed, rate in enumerate((0.5, 0.0, 0.9, 0.2)):
        set_rate(model, rate)
        set_rate(twin, rate)
        assert_steps_agree(step(twin, x, seed), step(model, x, seed))


def test_evaluation_drops_nothing() -> None:
    model, x = build().eval(), torch.randn(2, 3, 32, 32)
    stock = model(x)
    swap(model)
    assert_close(model(x), stock)
    assert "keep_samples" not in operator_calls(lambda: model(x))


def test_only_kept_samples_are_computed(keep, monkeypatch) -> None:
    model, x = build(), torch.randn(4, 3, 32, 32)
    swap(model, readout=False)
    keep([1, 2])
    computed = []
    stock = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(q: Tensor, *args, **kwargs):
        computed.append(len(q))
        return stock(q, *args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", attention)
    model(x)
    assert computed == [2] * SIZES["depth"]


@pytest.mark.parametrize("name", ["deit", "deit3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "whole model"])
def test_16_bit_training_is_as_accurate_as_stocks(name, dtype, autocast) -> None:
    """Errors against stock in float64 from the same masks; of the gradients together, since few are large."""
    model, x = build(name), torch.randn(6, 3, 32, 32)
    _, exact, _ = exactly = step(copy.deepcopy(model).double(), x.double())
    if not autocast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        stock = step(model, x)
        assert not swap(model).kept
        ours = step(model, x)
    assert torch.equal(ours[2], stock[2]) and torch.equal(ours[2], exactly[2])
    assert ours[0].dtype == stock[0].dtype == dtype
    torch.testing.assert_close(ours[0], stock[0], rtol=TOLERANCE[torch.bfloat16], atol=TOLERANCE[torch.bfloat16])
    assert ours[1].keys() == stock[1].keys() == exact.keys()
    assert all(ours[1][name].dtype == stock[1][name].dtype for name in exact)

    def of_all(gradients: dict[str, Tensor]) -> Tensor:
        # Each relative to its size, that none goes unseen.
        return torch.cat([(gradients[n].double() / exact[n].abs().max()).flatten() for n in exact])

    assert errors(of_all(ours[1]), of_all(exact)).relative <= 2 * errors(of_all(stock[1]), of_all(exact)).relative


@pytest.mark.parametrize("name", ["deit", "distilled"])
def test_the_kernels_train_a_whole_model_as_stock(name) -> None:
    """In the interpreter: one row read after the last block, and two."""
    model, x = build(name, depth=2), torch.randn(3, 3, 32, 32)
    expected = step(model, x)
    swap(model)
    with backend.forced("triton"):
        assert_steps_agree(step(model, x), expected)


class Halved(DropPath):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def test_a_drop_path_of_the_users_own_is_called_and_its_block_is_kept() -> None:
    model, x = build(), torch.randn(6, 3, 32, 32)
    model.blocks[1].drop_path1 = Halved(0.5)
    model.blocks[2].drop_path2 = Halved(0.5)
    expected = step(model, x)
    report = swap(model)
    assert_steps_agree(step(model, x), expected)
    halved = f"{Halved.__module__}.Halved"
    assert report.kept == {"blocks.1": f"drop_path1 is a {halved}", "blocks.2": f"drop_path2 is a {halved}"}
    assert report.readout[""] == f"the last block: drop_path2 is a {halved}"


def test_a_model_of_this_library_follows_timms() -> None:
    options = {"img_size": 32, "num_classes": 10, "drop_path_rate": 0.5}
    model = randomise(timm.create_model("deit_tiny_patch16_224", **options)).train()
    ours = deit_fast.create_model("deit_tiny_patch16_224", **options).train()
    ours.load_state_dict(model.state_dict())
    x = torch.randn(6, 3, 32, 32)
    assert_steps_agree(step(ours, x), step(model, x))


def test_a_restored_model_drops_as_before() -> None:
    model, x = build(), torch.randn(6, 3, 32, 32)
    out, found, _ = step(model, x)
    swap(model)
    step(model, x)
    restore(model)
    out_again, found_again, _ = step(model, x)
    assert torch.equal(out, out_again)
    assert all(torch.equal(found[name], found_again[name]) for name in found)
