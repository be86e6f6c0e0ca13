"""What people do to a model's modules and parameters, before the swap and after it: pruning, adapters, other parts."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

pytest.importorskip("timm")
from timm.layers import DropPath, LayerScale
from timm.models import named_apply

import deit_fast
from tests.swap.helpers import LoraLinear
from tests.swap.situations import assert_same, images, logits_and_gradients, ran, report_in, vit

Edit = Callable[[nn.Module], None]
EDITS: dict[Edit, str] = {}


def leaves(outcome: str) -> Callable[[Edit], Edit]:
    """How the model runs after this edit: "whole" on the operators or in "parts"."""
    return lambda edit: EDITS.setdefault(edit, outcome) and edit


def pruned(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight[rows].detach())
        linear.bias = nn.Parameter(linear.bias[rows].detach())
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight[:, columns].detach())


@leaves("whole")
def hidden_widths_are_pruned(model: nn.Module) -> None:
    """As Torch-Pruning does: other parameters in the same modules."""
    for i, block in enumerate(model.blocks):
        kept = torch.arange(200 + 8 * i)
        pruned(block.mlp.fc1, rows=kept)
        pruned(block.mlp.fc2, columns=kept)


@leaves("whole")
def heads_are_pruned(model: nn.Module) -> None:
    for block in model.blocks:
        pruned(block.attn.qkv, rows=torch.cat([torch.arange(64) + 96 * i for i in range(3)]))
        pruned(block.attn.proj, columns=torch.arange(64))
        block.attn.num_heads, block.attn.attn_dim = 2, 64


@leaves("parts")
def weights_are_masked(model: nn.Module) -> None:
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.3)
        prune.ln_structured(block.mlp.fc1, "weight", 0.3, 2, 0)


@leaves("whole")
def masks_are_made_permanent(model: nn.Module) -> None:
    weights_are_masked(model)
    for block in model.blocks:
        prune.remove(block.attn.qkv, "weight")
        prune.remove(block.mlp.fc1, "weight")


@leaves("parts")
def weights_are_normalised(model: nn.Module) -> None:
    parametrizations.weight_norm(model.blocks[0].attn.qkv)
    parametrizations.weight_norm(model.blocks[1].mlp.fc1)


@leaves("parts")
def weights_have_another_norm_by_a_hook(model: nn.Module) -> None:
    nn.utils.spectral_norm(model.blocks[0].mlp.fc1)


class LoraQkv(nn.Module):
    """As LoRA-ViT and SAM's adapters wrap a packed projection: added in place to a part of its result."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv = qkv
        self.down, self.up = nn.Linear(96, 2, bias=False), nn.Linear(2, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.qkv(x)
        projected[:, :, :96] += self.up(self.down(x))
        return projected


@leaves("parts")
def qkv_is_wrapped_and_the_rest_frozen(model: nn.Module) -> None:
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = LoraQkv(block.attn.qkv)


@leaves("whole")
def adapters_are_merged(model: nn.Module) -> None:
    """Small ones: of large weights, stock's own float32 gradients are right to two digits."""
    for block in model.blocks:
        lora, merged = LoraLinear(block.attn.qkv), nn.Linear(96, 288)
        merged.weight, merged.bias = nn.Parameter((lora.weight + 0.1 * lora.up @ lora.down).detach()), lora.bias
        block.attn.qkv = merged


class Adapted(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.down, self.up = mlp, nn.Linear(96, 4), nn.Linear(4, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.up(self.down(x).relu())


@leaves("parts")
def mlps_have_adapters(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp = Adapted(block.mlp)


class OtherAttention(nn.Module):
    """As xFormers' attention is put in: another module of the same parameters."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = attn.qkv, attn.proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 6, 16)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@leaves("parts")
def attentions_are_replaced(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn = OtherAttention(block.attn)


@leaves("parts")
def activations_are_replaced(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp.act = nn.ReLU()


@leaves("whole")
def another_gelu_is_chosen(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp.act.approximate = "tanh"


@leaves("parts")
def norms_are_of_another_kind(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm1 = nn.RMSNorm(96)


@leaves("whole")
def norms_have_another_epsilon_and_no_parameters(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm1 = nn.LayerNorm(96, elementwise_affine=False)
        block.norm2.eps = 0.1


@leaves("whole")
def biases_are_taken_off(model: nn.Module) -> None:
    model.blocks[0].attn.qkv.bias = None
    model.blocks[1].mlp.fc1.register_parameter("bias", None)


@leaves("whole")
def layer_scale_is_added(model: nn.Module) -> None:
    for block in model.blocks:
        block.ls1, block.ls2 = LayerScale(96, 0.5), LayerScale(96, 0.3)


@leaves("whole")
def blocks_are_cut_off(model: nn.Module) -> None:
    model.blocks = model.blocks[:2]


@leaves("whole")
def blocks_are_reordered_and_one_is_inserted(model: nn.Module) -> None:
    blocks = list(model.blocks)
    model.blocks = nn.Sequential(*reversed([copy.deepcopy(blocks[2]), *blocks[1:]]))


@leaves("whole")
def blocks_are_dropped(model: nn.Module) -> None:
    model.blocks[1] = nn.Identity()
    model.blocks[-1] = nn.Identity()


@leaves("whole")
def weights_are_shared(model: nn.Module) -> None:
    model.blocks[2].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
    model.blocks[3].attn = model.blocks[2].attn


@leaves("whole")
def norm_and_head_are_taken_off(model: nn.Module) -> None:
    model.norm, model.head = nn.Identity(), nn.Identity()


@leaves("whole")
def there_is_another_head(model: nn.Module) -> None:
    model.head = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))


@leaves("parts")
def all_tokens_are_pooled(model: nn.Module) -> None:
    model.reset_classifier(7, "avg")


@leaves("parts")
def registers_are_added(model: nn.Module) -> None:
    model.reg_token, model.num_prefix_tokens = nn.Parameter(torch.ones(1, 2, 96)), 3
    of_cls, of_patches = model.pos_embed[:, :1], model.pos_embed[:, 1:]
    model.pos_embed = nn.Parameter(torch.cat((of_cls, of_cls, of_cls, of_patches), 1).detach())


@leaves("whole")
def positions_become_a_buffer(model: nn.Module) -> None:
    positions = model.pos_embed.detach() * 2
    del model.pos_embed
    model.register_buffer("pos_embed", positions)


@leaves("whole")
def half_of_it_is_frozen(model: nn.Module) -> None:
    for part in (model.patch_embed, *model.blocks[:2]):
        part.requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    model.cls_token.requires_grad_(False)


@leaves("whole")
def biases_alone_are_trained(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


@leaves("whole")
def weights_are_set_anew(model: nn.Module) -> None:
    def initialise(module: nn.Module, name: str) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1)

    named_apply(initialise, model)


@leaves("whole")
def weights_are_data_of_others(model: nn.Module) -> None:
    model.blocks[0].attn.qkv.weight.data = model.blocks[1].attn.qkv.weight.data.clone()


@pytest.mark.parametrize("when", ["before the swap", "after the swap", "after the swap, for the fallback"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_model_is_stocks(edit: Edit, when: str) -> None:
    model, x = vit(), images()
    twin = copy.deepcopy(model)
    if when != "before the swap":
        deit_fast.swap(twin)
    for each in (model, twin):
        torch.manual_seed(0)
        edit(each)
    if when == "before the swap":
        deit_fast.swap(twin)
    expected = logits_and_gradients(model, x)
    with deit_fast.ops.backend.forced("torch" if "fallback" in when else None):
        assert_same(logits_and_gradients(twin, x), expected)
    assert ran(deit_fast.report(twin)) == EDITS[edit]


def test_a_schedule_of_drop_path_is_followed() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        found, x = [], torch.cat([x] * 4)
        for block in model.train().blocks:
            block.drop_path1, block.drop_path2 = DropPath(0.1), DropPath(0.1)
        for rate in (0.0, 0.3, torch.tensor(0.6)):
            for block in model.blocks:
                block.drop_path1.drop_prob = block.drop_path2.drop_prob = rate
            found += logits_and_gradients(model, x)
        return found

    assert ran(report_in(situation)) == "whole"


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantized_linears_are_called() -> None:
    """A copy is made of the model, in which other modules stand in the linears' places."""
    model, x = vit(), images()
    quantize = torch.ao.quantization.quantize_dynamic
    expected = quantize(model, {nn.Linear}, dtype=torch.qint8)(x)
    deit_fast.swap(model)
    quantized = quantize(model, {nn.Linear}, dtype=torch.qint8)
    assert_same([quantized(x)], [expected])
    assert ran(deit_fast.report(quantized)) == "parts"
