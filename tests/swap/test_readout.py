"""When the last block of a classifier is computed for the rows that are read, and when it must be whole."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deit_fast.nn.readout import reading
from deit_fast.swap import restore, swap, swapped
from tests.swap.helpers import (
    LoraLinear,
    assert_close,
    assert_same_gradients,
    gradients,
    operator_calls,
    randomise,
)

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from tests.swap.original_models import DeiT3  # noqa: E402


def vit(**options) -> nn.Module:
    options = {
        "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10,
    } | options  # fmt: skip
    return randomise(VisionTransformer(**options)).eval()


def hugging_face(class_name: str = "DeiTForImageClassification", attention: str = "sdpa") -> nn.Module:
    config = transformers.DeiTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    config._attn_implementation = attention
    return randomise(getattr(transformers, class_name)(config)).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def tensor_of(result) -> Tensor:
    """What a call's gradients are taken of: logits, or all that it gives."""
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "logits"):
        return result.logits
    return torch.cat([t.flatten() for t in (result.values() if isinstance(result, dict) else result)])


def assert_follows_stock(model: nn.Module, stock: nn.Module, call=lambda model, x: model(x), *, readout: bool) -> None:
    """Values and gradients of `call` are those of `stock`, and the last block is computed as it should be."""
    x = images()
    result, expected = tensor_of(call(model, x)), tensor_of(call(stock, x))
    assert_close(result, expected)
    assert_same_gradients(gradients(model, result.square().sum()), gradients(stock, expected.square().sum()))
    calls = operator_calls(lambda: call(model, x))
    assert calls["readout_attention"] == readout


def pair(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """The model swapped, and the stock one."""
    stock = copy.deepcopy(model)
    swap(model, **options)
    return model, stock


# timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"class_token": True, "init_values": 0.5}, {"qkv_bias": False}])
def test_a_classifier_computes_the_rows_it_reads(options) -> None:
    model, stock = pair(vit(**options))
    assert_follows_stock(model, stock, readout=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: model.forward_features(x),
        lambda model, x: model.forward_intermediates(x, norm=True, intermediates_only=True),
        lambda model, x: model.get_intermediate_layers(x, n=2),
        lambda model, x: model.norm(model.blocks(model._pos_embed(model.patch_embed(x)))),
        lambda model, x: model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool).tril()),
        lambda model, x: model(x, is_causal=True),
    ],
    ids=["forward_features", "forward_intermediates", "get_intermediate_layers", "by hand", "mask", "causal"],
)
def test_calls_that_read_more_get_the_whole_block(call) -> None:
    model, stock = pair(vit())
    assert_follows_stock(model, stock, call, readout=False)
    assert_follows_stock(model, stock, readout=True)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("blocks.1", "the last block: has a hook"),
        ("blocks.1.norm1", "the last block: norm1 has a hook"),
        ("blocks.1.attn", "the last block: attn has a hook"),
        ("blocks.1.mlp.act", "the last block: mlp: act has a hook"),
        ("norm", "the last norm has a hook"),
        ("blocks", "the sequence of blocks has a hook"),
    ],
)
def test_a_hook_sees_every_token(place, reason) -> None:
    model, stock = pair(vit())
    seen = []
    handles = [
        m.get_submodule(place).register_forward_hook(lambda module, args, out: seen.append(out)) for m in (model, stock)
    ]
    assert_follows_stock(model, stock, readout=False)
    ours, theirs = seen[:2]
    assert ours.shape[1] == 17
    assert_close(ours, theirs)
    assert swap(model).readout == {"": reason}
    for handle in handles:
        handle.remove()
    assert swap(model).readout == {"": None}
    assert_follows_stock(model, stock, readout=True)


def test_a_hook_on_an_earlier_block_does_not_matter() -> None:
    model, stock = pair(vit())
    for m in (model, stock):
        m.blocks[0].register_forward_hook(lambda module, args, out: 2 * out)
    assert_follows_stock(model, stock, readout=True)


@pytest.mark.parametrize(
    "options", [{"global_pool": "avg"}, {"global_pool": "max"}, {"global_pool": "map"}, {"global_pool": ""}]
)
def test_other_pooling_reads_every_token(options) -> None:
    model, stock = pair(vit(**options))
    assert_follows_stock(model, stock, readout=False)
    assert swap(model).readout == {"": "more than the prefix tokens is read after the last block"}


def test_a_pooling_of_the_users_own_reads_every_token() -> None:
    model, stock = pair(vit())
    for m in (model, stock):
        m.pool = lambda x, pool_type=None: x.mean(1)
    assert_follows_stock(model, stock, readout=False)


def test_a_lora_linear_in_the_last_block_is_computed_for_every_token() -> None:
    model = vit()
    model.blocks[1].attn.qkv = LoraLinear(model.blocks[1].attn.qkv)
    model, stock = pair(model)
    assert_follows_stock(model, stock, readout=False)
    assert swap(model).readout[""].startswith("the last block: attn: qkv is a tests.swap.helpers.LoraLinear")


@pytest.mark.parametrize("depth", [1, 2])
def test_timms_gradient_checkpointing_keeps_the_readout(depth) -> None:
    model, stock = pair(vit(depth=depth, drop_path_rate=0.3).train())
    for m in (model, stock):
        m.set_grad_checkpointing(True)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return model(x)

    assert_follows_stock(model, stock, call, readout=True)


def test_a_checkpointed_classifier_is_recomputed_the_same() -> None:
    model, stock = pair(vit().train())
    for use_reentrant in (False, True):

        def call(model: nn.Module, x: Tensor, use_reentrant=use_reentrant) -> Tensor:
            return checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)

        assert_follows_stock(model, stock, call, readout=True)


# The option, its flags and the report -------------------------------------------------------------------------------

FLAGS = {"_deit_fast_memory", "_deit_fast_readout", "_deit_fast_compact", "_deit_fast_rows", "readout_rows"}
MODELS = {"timm": vit, "transformers": hugging_face, "original": lambda: randomise(DeiT3()).eval()}
of_every_library = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def flags(model: nn.Module) -> set[str]:
    return {name for module in model.modules() for name in FLAGS & module.__dict__.keys()}


@of_every_library
def test_readout_can_be_refused_and_asked_for_again(build) -> None:
    model, stock = pair(build(), readout=False)
    assert_follows_stock(model, stock, readout=False)
    report = swap(model, readout=False)
    assert report.readout == {"": "readout=False"}
    assert str(report).endswith("\nlast block of (model): all rows, since readout=False")
    report = swap(model)
    assert report.readout == {"": None}
    assert str(report).endswith("\nlast block of (model): only the rows that are read")
    assert_follows_stock(model, stock, readout=True)


@of_every_library
@pytest.mark.parametrize("readout", [True, False])
def test_copies_keep_the_choice_and_restored_models_keep_no_flag(build, readout) -> None:
    model, stock = pair(build(), readout=readout)
    model(images())
    twin = copy.deepcopy(model)
    assert_follows_stock(twin, stock, readout=readout)
    restore(twin)
    for stock_again in (twin, pickle.loads(pickle.dumps(model))):
        assert not flags(stock_again)
        assert_follows_stock(stock_again, stock, readout=False)
        swap(stock_again)
        assert_follows_stock(stock_again, stock, readout=True)


@of_every_library
def test_a_with_block_gives_back_the_choice_made_before_it(build) -> None:
    model, stock = pair(build(), readout=False)
    with swapped(model):
        assert_follows_stock(model, stock, readout=True)
    assert_follows_stock(model, stock, readout=False)


@pytest.mark.parametrize("build", [MODELS["transformers"], MODELS["original"]], ids=["transformers", "original"])
@pytest.mark.parametrize("place", ["last block", "head"])
def test_an_exception_in_a_call_leaves_no_flag_behind(build, place) -> None:
    model, stock = pair(build())
    last, head = (model.deit.layers[-1], model.classifier) if hasattr(model, "deit") else (model.blocks[-1], model.head)
    broken = head if place == "head" else last.mlp.fc2
    weight, broken.weight = broken.weight, nn.Parameter(torch.zeros(3, 1))
    with pytest.raises((ValueError, RuntimeError)):
        model(images())
    broken.weight = weight
    assert last.readout_rows is None
    assert last(torch.randn(2, 17, 64)).shape == (2, 17, 64)
    assert_follows_stock(model, stock, readout=True)


# transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_transformers_classifiers_compute_the_rows_they_read(class_name) -> None:
    model, stock = pair(hugging_face(class_name))
    assert_follows_stock(model, stock, readout=True)
    assert_follows_stock(model.train(), stock.train(), readout=True)


@pytest.mark.parametrize("first", ["asked", "plain"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_is_asked_for_is_whole(asked, attention, first) -> None:
    model, stock = pair(hugging_face(attention=attention))
    key = asked.removeprefix("output_")

    def call(model: nn.Module, x: Tensor) -> Tensor:
        found = model(x, **{asked: True})
        assert len(found[key]) == (0 if key == "attentions" and attention == "sdpa" else 2 + (key == "hidden_states"))
        return torch.cat([t.flatten() for t in (found.logits, *found[key])])

    if first == "plain":
        assert_follows_stock(model, stock, readout=True)
    assert_follows_stock(model, stock, call, readout=False)
    assert_follows_stock(model, stock, readout=True)


def test_hidden_states_asked_for_by_the_configuration_are_whole() -> None:
    model, stock = pair(hugging_face())
    for m in (model, stock):
        m.config.output_hidden_states = True
    assert_follows_stock(model, stock, lambda m, x: torch.cat(m(x).hidden_states), readout=False)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("deit", "the model has a hook"),
        ("deit.layernorm", "the last norm has a hook"),
        ("deit.layers.1", "the last layer has a hook"),
        ("deit.layers.1.attention", "the last layer: attention has a hook"),
        ("deit.layers.1.mlp.fc1", "the last layer: mlp: fc1 has a hook"),
    ],
)
def test_a_hook_in_transformers_sees_every_token(place, reason) -> None:
    model, stock = pair(hugging_face())
    seen = []

    def keep(module, args, out):
        seen.append(next(t for t in (out if isinstance(out, tuple) else [getattr(out, "last_hidden_state", out)])))

    handles = [m.get_submodule(place).register_forward_hook(keep) for m in (model, stock)]
    assert_follows_stock(model, stock, readout=False)
    assert seen[0].shape[1] == 18
    assert_close(seen[0], seen[1])
    assert swap(model).readout == {"": reason}
    for handle in handles:
        handle.remove()
    assert_follows_stock(model, stock, readout=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_whole_in_training(use_reentrant) -> None:
    model, stock = pair(hugging_face().train())
    for m in (model, stock):
        m.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.requires_grad_()).logits

    assert_follows_stock(model, stock, call, readout=False)
    assert swap(model).readout == {"": "the last layer is checkpointed"}
    assert_follows_stock(model.eval(), stock.eval(), readout=True)


def test_the_model_within_gives_every_row_after_a_call_of_the_classifier() -> None:
    model, stock = pair(hugging_face())
    assert_follows_stock(model, stock, readout=True)
    assert_follows_stock(model, stock, lambda m, x: m.deit(x).last_hidden_state, readout=False)


# The original repository ------------------------------------------------------------------------------------------


class Checkpointed(DeiT3):
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if self.training else block(x)
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_that_checkpoints_its_blocks_computes_them_whole(use_reentrant) -> None:
    """Backward calls the last block again, when nobody says any more which rows are read."""
    model = randomise(Checkpointed()).train()
    model.use_reentrant = use_reentrant
    model, stock = pair(model)
    x = images()
    result, expected = model(x), stock(x)
    assert_close(result, expected)
    assert_same_gradients(gradients(model, result.square().sum()), gradients(stock, expected.square().sum()))
    assert_follows_stock(model.eval(), stock.eval(), readout=True)


@of_every_library
def test_a_call_from_another_thread_gets_every_row(build) -> None:
    model, _ = pair(build())
    last = model.deit.layers[-1] if hasattr(model, "deit") else model.blocks[-1]
    with reading(last, 1), ThreadPoolExecutor(1) as pool:
        assert last(torch.randn(2, 17, 64)).shape == (2, 1, 64)
        assert pool.submit(last, torch.randn(2, 17, 64)).result().shape == (2, 17, 64)
    assert last(torch.randn(2, 17, 64)).shape == (2, 17, 64)


class MoreInTraining(DeiT3):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return (self.head(x[:, 0]), x) if self.training else self.head(x[:, 0])


def test_a_model_that_reads_more_in_training_gets_it_when_swapped_in_evaluation() -> None:
    model, stock = pair(randomise(MoreInTraining()).eval())
    assert_follows_stock(model, stock, readout=False)
    assert_follows_stock(model.train(), stock.train(), readout=False)


def test_finding_what_a_model_reads_leaves_it_and_the_generator_alone() -> None:
    model = randomise(DeiT3()).train()
    model.norm = nn.Sequential(model.norm, nn.BatchNorm1d(17), nn.Dropout(0.5))
    model.head.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    swap(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert [m.training for m in model.modules()] == modes


class OverTokens(nn.BatchNorm1d):
    """A norm whose rows hang on one another: its channels are the tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)


@of_every_library
@pytest.mark.parametrize("training", [True, False])
def test_a_last_norm_that_does_not_work_by_rows_gets_every_row(build, training) -> None:
    model = build()
    # transformers' has a distillation token.
    place, tokens = ("deit.layernorm", 18) if hasattr(model, "deit") else ("norm", 17)
    model.set_submodule(place, OverTokens(tokens))
    model, stock = pair(model.train(training))
    assert_follows_stock(model, stock, readout=False)
    model, stock = pair(model)
    for each in (model, stock):
        torch.manual_seed(1)
        each(images())
    for ours, theirs in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@of_every_library
def test_a_last_block_used_before_is_whole(build) -> None:
    model = build()
    blocks = model.deit.layers if hasattr(model, "deit") else model.blocks
    blocks[0] = blocks[1]
    model, stock = pair(model)
    assert_follows_stock(model, stock, readout=False)
