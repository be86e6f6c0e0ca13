"""What explains a model: activations, attention maps and gradients that hooks are handed, inputs on a path."""

import types

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

pytest.importorskip("timm")
from timm.models.vision_transformer import Attention, Block

from deit_fast.swap import restore, swap
from tests.swap.helpers import gradients
from tests.swap.situations import assert_same, images, logits_and_gradients, ran, report_in, vit

on_both_paths = pytest.mark.parametrize("chosen", [None, "torch"])


def part(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


PLACES = {
    "blocks.3.norm1": "parts",
    "blocks.3": "whole",
    "blocks.1": "whole",
    "blocks.2.attn": "parts",
    "blocks.2.mlp": "parts",
    "norm": "parts",
    "patch_embed": "parts",
}


@on_both_paths
@pytest.mark.parametrize("place", PLACES)
def test_grad_cam_sees_activations_and_their_gradients(place: str, chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        seen = []

        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen.append(output.detach())
            output.register_hook(seen.append)

        handle = part(model, place).register_forward_hook(keep)
        logits = model(x)
        logits[:, 3].sum().backward()
        handle.remove()
        return [logits, *seen]

    assert ran(report_in(situation, chosen)) == PLACES[place]


@on_both_paths
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_may_change_an_output_in_place(place: str, chosen: str | None) -> None:
    """As steering vectors and ablations do."""

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        def steer(module: nn.Module, args: tuple, output: Tensor) -> None:
            output[:, 0] += 1

        part(model, place).register_forward_hook(steer)
        return logits_and_gradients(model, x)

    assert ran(report_in(situation, chosen)) == PLACES[place]


@on_both_paths
def test_a_hook_may_change_an_input_in_place(chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        for block in model.blocks[1:]:
            block.register_forward_pre_hook(lambda module, args: args[0].add_(0.1))
        return logits_and_gradients(model, x)

    assert ran(report_in(situation, chosen)) == "whole"


@on_both_paths
def test_results_may_be_changed_in_place(chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        tokens = model._pos_embed(model.patch_embed(x)).clone()
        for block in model.blocks:
            tokens = block(tokens)
            tokens *= 0.9
            tokens[:, 1] = 0
        return [tokens, *gradients(model, tokens.square().sum()).values()]

    assert ran(report_in(situation, chosen)) == "whole"


@pytest.mark.parametrize("way", ["a hook", "another module"])
def test_attention_rollout_sees_every_map(way: str) -> None:
    """As vit-explain collects them: what reaches `attn_drop` on the path that is not fused."""

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        maps = []

        class Recorder(nn.Identity):
            def forward(self, attention: Tensor) -> Tensor:
                maps.append(attention)
                return attention

        for block in model.blocks:
            block.attn.fused_attn = False
            if way == "a hook":
                block.attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
            else:
                block.attn.attn_drop = Recorder()
        logits = model(x)
        assert len(maps) == 4
        return [logits, *maps]

    assert ran(report_in(situation)) == "parts"


def test_the_last_maps_are_those_of_its_parts() -> None:
    """As DINO's `get_last_selfattention` calls a model's parts by itself."""

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        tokens = model._pos_embed(model.patch_embed(x))
        *blocks, last = model.blocks
        for block in blocks:
            tokens = block(tokens)
        q, k, _ = last.attn.qkv(last.norm1(tokens)).unflatten(2, (3, 3, 32)).permute(2, 0, 3, 1, 4)
        return [tokens, (q @ k.mT * last.attn.scale).softmax(-1)]

    assert ran(report_in(situation)) == "whole"


def test_a_full_backward_hook_on_the_last_block_sees_every_row() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        seen = []
        model.blocks[-1].register_full_backward_hook(lambda module, inputs, outputs: seen.extend((*inputs, *outputs)))
        logits = model(x.requires_grad_())
        logits[:, 3].sum().backward()
        return [logits, *seen]

    assert ran(report_in(situation)) == "whole"


def test_a_hook_for_several_gradients_fires() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        outputs, seen = [], []
        for block in model.blocks[::2]:
            block.register_forward_hook(lambda module, args, output: outputs.append(output))
        logits = model(x)
        register_multi_grad_hook(outputs, seen.extend)
        logits.sum().backward()
        assert len(seen) == 2
        return seen

    assert ran(report_in(situation)) == "whole"


def test_parameters_hooks_see_and_change_gradients() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        seen = {}
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
        model(x).square().sum().backward()
        return [seen[name] for name, _ in model.named_parameters()]

    assert ran(report_in(situation)) == "whole"


def test_integrated_gradients_are_stocks() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        model.requires_grad_(False)
        steps = [(x * weight).requires_grad_() for weight in torch.linspace(0, 1, 5)]
        return [torch.autograd.grad(model(step)[:, 1].sum(), step)[0] for step in steps]

    assert ran(report_in(situation)) == "whole"


def test_dense_tokens_are_stocks() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        features = model.get_intermediate_layers(x, n=2, reshape=True)
        return [model.forward_features(x), *features]

    assert ran(report_in(situation)) == "whole"


@pytest.mark.parametrize("way", ["a method", "a hook"])
def test_prompts_are_put_among_the_tokens(way: str) -> None:
    """As visual prompt tuning does."""
    prompts = torch.randn(1, 4, 96)

    def prompted(tokens: Tensor) -> Tensor:
        return torch.cat((tokens[:, :1], prompts.expand(len(tokens), -1, -1), tokens[:, 1:]), 1)

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        if way == "a hook":
            model.blocks.register_forward_pre_hook(lambda module, args: (prompted(args[0]),))
        else:
            stock = model._pos_embed
            model._pos_embed = types.MethodType(lambda self, tokens: prompted(stock(tokens)), model)
        return logits_and_gradients(model, x)

    assert ran(report_in(situation)) == ("whole" if way == "a hook" else "parts")


# Token merging -----------------------------------------------------------------------------------------------------


class MergingBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        attended, metric = self.attn(self.norm1(x))
        x = x + attended
        dropped = metric.norm(dim=-1)[:, 1:].argsort(dim=1)[:, : self._tome_info["r"].pop(0)] + 1
        kept = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, dropped, False)
        x = x[kept].view(len(x), -1, x.shape[-1])
        return x + self.mlp(self.norm2(x))


class MergingAttention(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2)), k.mean(1)


def merging(model: nn.Module) -> nn.Module:
    """As ToMe's `patch.timm` sets the classes of a model and of its modules."""

    class MergingTransformer(type(model)):
        def forward(self, *args, **kwargs) -> Tensor:
            self._tome_info["r"] = [3] * len(self.blocks)
            return super().forward(*args, **kwargs)

    model.__class__, model._tome_info = MergingTransformer, {}
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__, module._tome_info = MergingBlock, model._tome_info
        elif isinstance(module, Attention):
            module.__class__ = MergingAttention
    return model


@pytest.mark.parametrize("order", ["swap first", "merge first"])
def test_token_merging_works_in_both_orders(order: str) -> None:
    x = images()
    expected = merging(vit())(x)
    model = vit()
    if order == "swap first":
        swap(model)
        merging(model)
    else:
        merging(model)
        report = swap(model)
        assert "blocks.0" in report.kept and "blocks.0.mlp" in report.swapped
    assert_same([model(x)], [expected])
    restore(model)
    assert_same([model(x)], [expected])
