"""Half a block as one node of the graph, with what autograd, autocast and frozen parameters ask of stock PyTorch."""

from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deit_fast import ops, swap
from deit_fast.ops import backend

HEADS, WIDTH, TOKENS, BATCH = 2, 64, 6, 3


def blocks(**options: float) -> tuple[nn.Module, nn.Module]:
    """timm's, and the same swapped."""
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    stock = nn.Sequential(Block(WIDTH, HEADS, qkv_bias=True, **options)).train()
    for parameter in stock.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    swapped = nn.Sequential(Block(WIDTH, HEADS, qkv_bias=True, **options)).train()
    swapped.load_state_dict(stock.state_dict())
    swap(swapped)
    return stock, swapped


def node(y: Tensor) -> str:
    return type(y.grad_fn).__name__


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH).requires_grad_()


@pytest.mark.usefixtures("triton_backend")
class TestOneNode:
    def test_training_makes_a_node_of_each_half_and_the_gradients_are_stocks(self, x) -> None:
        stock, swapped = blocks(init_values=0.5)
        expected, found = stock(x), swapped(x)
        of_attention = found.grad_fn.next_functions[0][0]
        assert [node(found), type(of_attention).__name__] == ["HalfBlockBackward"] * 2
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        back = torch.randn(x.shape)
        for ours, theirs in zip(
            torch.autograd.grad(found, [x, *swapped.parameters()], back),
            torch.autograd.grad(expected, [x, *stock.parameters()], back),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())

    @pytest.mark.parametrize("name", ["norm1.bias", "attn.qkv.weight", "attn.proj.bias", "ls1.gamma", "norm2.weight"])
    def test_a_parameter_that_alone_is_trained_has_stocks_gradient(self, name) -> None:
        x = torch.randn(BATCH, TOKENS, WIDTH)
        stock, swapped = blocks(init_values=0.5)
        found = []
        for model in (stock, swapped):
            model.requires_grad_(False)
            parameter = model[0].get_parameter(name).requires_grad_()
            found.append(torch.autograd.grad(model(x).square().sum(), parameter))
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())

    @pytest.mark.parametrize("autocast", [False, True])
    def test_a_gradient_penalty_is_stocks(self, x, autocast) -> None:
        stock, swapped = blocks()
        found = []
        for model in (stock, swapped):
            x = x.detach().requires_grad_()
            # Stock's other attention has no second derivative.
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), sdpa_kernel(SDPBackend.MATH):
                y = model(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            dx.square().sum().backward()
            found.append([x.grad, *(p.grad for p in model.parameters())])
        for theirs, ours in zip(*found, strict=True):
            error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-3)
            assert error < (5e-2 if autocast else 1e-4)

    def test_layer_scale_in_float32_widens_the_stream_under_autocast_as_in_stock(self, x) -> None:
        stock, swapped = blocks(init_values=0.5)
        found = []
        for model in (stock, swapped):
            given = x.detach().bfloat16().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(given)
            assert y.dtype is torch.float32
            found.append(torch.autograd.grad(y.square().sum(), [given, *model.parameters()]))
        for theirs, ours in zip(*found, strict=True):
            assert ours.dtype is theirs.dtype
            assert (ours - theirs).float().norm() < 5e-2 * theirs.float().norm().clamp(min=1.0)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_batched_gradients_are_those_one_by_one(self, x) -> None:
        _, swapped = blocks()
        y, backs = swapped(x), torch.randn(2, *x.shape)
        (batched,) = torch.autograd.grad(y, x, backs, is_grads_batched=True, retain_graph=True)
        for each, back in zip(batched, backs, strict=True):
            (expected,) = torch.autograd.grad(y, x, back, retain_graph=True)
            torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_a_vectorized_jacobian_has_derivatives_of_its_own(self) -> None:
        stock, swapped = blocks()
        x, factor, found = torch.randn(1, 2, WIDTH), torch.ones(2, 1, requires_grad=True), []
        for model in (stock, swapped):
            with sdpa_kernel(SDPBackend.MATH):
                jacobian = torch.autograd.functional.jacobian(
                    lambda factor, m=model: m(x * factor)[0, :, :2], factor, create_graph=True, vectorize=True
                )
                found.append(torch.autograd.grad(jacobian.square().sum(), factor)[0])
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)

    def test_backward_runs_twice_where_the_graph_is_kept(self, x) -> None:
        _, swapped = blocks()
        y = swapped(x).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)

    def test_what_is_changed_before_backward_is_an_error_as_in_stock(self, x) -> None:
        _, swapped = blocks()
        y = swapped(x).sum()
        with torch.no_grad():
            swapped[0].attn.qkv.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()

    def test_an_output_that_nobody_reads_has_no_gradients(self, x) -> None:
        _, swapped = blocks()
        y = swapped(x)
        (found,) = torch.autograd.grad((2 * x).sum() + 0 * y.detach().sum(), x)
        assert torch.equal(found, torch.full_like(x, 2.0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_layer_scale_widens_is_refused_as_in_stock(self, dtype) -> None:
        _, swapped = blocks(init_values=0.5)
        swapped.bfloat16()
        for each in (swapped[0].ls1, swapped[0].ls2):
            each.to(dtype)
        x = torch.randn(BATCH, TOKENS, WIDTH).bfloat16().requires_grad_()
        if dtype is torch.bfloat16:
            swapped(x)
        else:
            with pytest.raises(TypeError, match=r"layer_norm_fc1: the input is torch\.float32"):
                swapped(x)

    def test_a_graph_of_gradients_costs_a_second_forward_only_where_it_is_used(self, x, monkeypatch) -> None:
        _, swapped = blocks()
        again = []
        for half in (ops.attention_half, ops.mlp_half):
            one_by_one = half.one_by_one
            monkeypatch.setattr(half, "one_by_one", lambda *a, f=one_by_one: (again.append(1), f(*a))[1])
        with sdpa_kernel(SDPBackend.MATH):
            (dx,) = torch.autograd.grad(swapped(x).sum(), x, create_graph=True)
            assert again == []
            dx.square().sum().backward()
        assert len(again) == 2

    @pytest.mark.parametrize("watched", [profile, partial(FlopCounterMode, display=False)])
    def test_a_checkpointed_block_may_be_watched_in_backward_alone(self, x, watched) -> None:
        _, swapped = blocks()
        (expected,) = torch.autograd.grad(swapped(x).square().sum(), x)
        y = checkpoint(swapped, x, use_reentrant=False).square().sum()
        with watched():
            y.backward()
        torch.testing.assert_close(x.grad, expected)

    @pytest.mark.parametrize("training", [False, True])
    def test_compiled_it_is_one_graph(self, x, training) -> None:
        _, swapped = blocks()
        with torch.set_grad_enabled(training):
            expected = swapped(x)
            found = torch.compile(swapped, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, expected)

    def test_a_frozen_half_keeps_nothing_of_its_input(self) -> None:
        """It may be of inference mode, or be written over before backward."""
        _, swapped = blocks()
        swapped[0].norm1.requires_grad_(False)
        swapped[0].attn.requires_grad_(False)
        with torch.inference_mode():
            x = torch.randn(BATCH, TOKENS, WIDTH)
        swapped(x).sum().backward()
        x, expected = torch.randn(BATCH, TOKENS, WIDTH), swapped[0].mlp.fc1.weight.grad
        swapped.zero_grad()
        y = swapped(x)
        x.zero_()
        swapped[0].attn.qkv.weight.zero_()
        y.sum().backward()
        assert swapped[0].mlp.fc1.weight.grad.isfinite().all() and expected.isfinite().all()

    def test_where_only_the_last_operator_trains_the_branchs_input_is_not_kept(self) -> None:
        _, swapped = blocks()
        swapped.requires_grad_(False)
        swapped[0].attn.proj.weight.requires_grad_()
        swapped[0].mlp.fc2.weight.requires_grad_()
        with torch.inference_mode():
            x = torch.randn(BATCH, TOKENS, WIDTH)
        swapped(x).sum().backward()
        assert swapped[0].attn.proj.weight.grad is not None

    def test_without_a_gradient_the_numbers_do_not_hang_on_who_watches(self, x) -> None:
        _, swapped = blocks()
        swapped.bfloat16().requires_grad_(False)
        x = x.detach().bfloat16()
        plain = swapped(x)
        with profile():
            watched = swapped(x)
        assert torch.equal(plain, watched)

    def test_an_undefined_gradient_of_a_gradient_is_none(self, x) -> None:
        _, swapped = blocks()
        with sdpa_kernel(SDPBackend.MATH):
            wanted = x, swapped[0].mlp.fc2.weight
            _, dweight = torch.autograd.grad(swapped(x).square().sum(), wanted, create_graph=True)
            (found,) = torch.autograd.grad(dweight.sum(), x, retain_graph=True)
        assert found.isfinite().all()

    def test_drop_path_draws_a_mask_for_each_model_of_an_ensemble(self, x) -> None:
        """The second draw is made of what the first half gives, which has the ensemble's dimension."""
        stock, swapped = blocks()
        for model in (stock, swapped):
            model[0].drop_path2 = timm.layers.DropPath(0.5)
            stacked = {name: torch.stack([p, p]) for name, p in model.named_parameters()}
            run = torch.func.vmap(
                lambda parameters, m=model: torch.func.functional_call(m, parameters, (x.detach(),)),
                randomness="different",
            )
            assert run(stacked).shape == (2, *x.shape)


def test_forward_on_the_kernels_and_backward_on_stock_agree(x) -> None:
    _, swapped = blocks()
    with backend.forced("triton"):
        (expected,) = torch.autograd.grad(swapped(x).square().sum(), x)
        y = swapped(x).square().sum()
    with backend.forced("torch"):
        (found,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_on_a_cpu_stock_operators_make_the_graph(x) -> None:
    _, swapped = blocks()
    assert node(swapped(x)) != "HalfBlockBackward"
    assert all(not chain.plans for half in (ops.attention_half, ops.mlp_half) for chain in half.all_chains)


def test_a_whole_model_trains_as_stock_does(triton_backend) -> None:
    torch.manual_seed(0)
    stock = timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=64, num_heads=1, depth=2, num_classes=5)
    swapped = timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=64, num_heads=1, depth=2, num_classes=5)
    swapped.load_state_dict(stock.state_dict())
    swap(swapped)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    losses = []
    for model in (stock, swapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-4)
