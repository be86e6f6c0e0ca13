"""Models of the original DeiT repository: classes that live in the user's own files."""

import copy
import io
import pickle
import sys
import threading
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from deit_fast.swap import restore, swap, swapped
from deit_fast.swap.reading import only_computes
from tests.swap.helpers import assert_close, assert_same_gradients, block_calls, gradients, operator_calls, randomise

timm = pytest.importorskip("timm")
from tests.swap.original_models import (  # noqa: E402
    Attention,
    Block,
    DeiT3,
    DistilledVisionTransformer,
    LayerScaleBlock,
)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def deit3(**options) -> nn.Module:
    return randomise(DeiT3(**options)).eval()


@pytest.mark.parametrize("block", [Block, LayerScaleBlock])
def test_both_blocks_agree_and_are_restored_bitwise(block: type[nn.Module]) -> None:
    model, x = deit3(block=block), images()
    classes = [type(module) for module in model.modules()]
    parameters, keys = list(model.parameters()), list(model.state_dict())
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert not report.kept and {"blocks.0", "blocks.1.attn", "norm"} <= set(report.swapped)
        assert_close(model(x), stock)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model.blocks[0], block) and type(model.blocks[0]).__name__ == block.__name__
    assert operator_calls(lambda: model(x)) == block_calls(2)
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    with torch.inference_mode():
        assert torch.equal(model(x), stock)


def test_the_distilled_model_agrees_and_keeps_its_own_embedding() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    model, x = randomise(DistilledVisionTransformer(**options)).eval(), images()
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert_close(model(x), stock)
    assert not report.kept and report.readout == {"": None}
    assert operator_calls(lambda: model(x)) == block_calls(2)


class MeanPooled(DeiT3):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def test_a_model_that_reads_every_row_gets_every_row() -> None:
    model, x = randomise(MeanPooled()).eval(), images()
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert_close(model(x), stock)
    reason = "it reads more than one or two rows after the last block"
    assert report.readout == report.kept == {"": reason}
    assert operator_calls(lambda: model(x)) == block_calls(2, readout=False)


def test_what_is_asked_of_a_block_by_itself_is_all_its_rows() -> None:
    model, tokens = deit3(), torch.randn(2, 17, 64)
    swap(model)
    model(images())
    assert model.blocks[-1](tokens).shape == tokens.shape
    with pytest.raises(RuntimeError, match="to have 3 channels"):  # stock's own
        model(torch.randn(2, 5, 32, 32))
    assert model.blocks[-1](tokens).shape == tokens.shape
    restore(model)
    assert not any("readout_rows" in module.__dict__ for module in model.modules())


def test_training_gives_stock_outputs_masks_and_gradients() -> None:
    model, x = deit3(drop_path=0.4).train(), images(8)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        out = model(x)
        results.append((out, gradients(model, out.square().sum())))
        swap(model)
    assert_close(results[1][0], results[0][0])
    assert_same_gradients(results[1][1], results[0][1])


def test_the_kernels_give_stocks_answer(triton_backend) -> None:
    model, x = deit3(depth=1), images(1)
    with torch.inference_mode():
        stock = model(x)
        swap(model)
        assert_close(model(x), stock)


def test_bfloat16_and_autocast_agree() -> None:
    model, x = deit3(), images()
    with torch.inference_mode():
        stock = torch.autocast("cpu", torch.bfloat16)(model)(x)
        swap(model)
        assert_close(torch.autocast("cpu", torch.bfloat16)(model)(x), stock)
        swapped = model.bfloat16()(x.bfloat16())
        restore(model)
        assert_close(swapped, model(x.bfloat16()))


def test_active_attention_dropout_runs_the_users_attention() -> None:
    model, x = deit3(attn_drop=0.5).train(), images()
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(model(x))
        report = swap(model)
    assert report.kept["blocks.0"] == "attn: dropout is active"
    assert_close(results[1], results[0])
    model.eval()
    assert operator_calls(lambda: model(x)) == block_calls(2)


def test_hooks_on_inner_modules_fire() -> None:
    model, x = deit3(), images()
    swap(model)
    seen = []
    model.blocks[0].drop_path.register_forward_hook(lambda *_: seen.append("drop_path"))
    model.blocks[1].attn.register_forward_hook(lambda *_: seen.append("attn"))
    model(x)
    assert seen == ["drop_path", "drop_path", "attn"]


def test_copies_are_swapped_and_pickles_are_stock() -> None:
    model, x = deit3(), images()
    with torch.inference_mode():
        stock = model(x)
        swap(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = copy.deepcopy(model)
        assert type(twin.blocks[0]) is type(model.blocks[0])
        assert torch.equal(twin(x), model(x))
        restore(twin)
        for stock_again in (
            twin,
            *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(stock_again) is DeiT3 and type(stock_again.blocks[0]) is LayerScaleBlock
            assert torch.equal(stock_again(x), stock)


class PostNormBlock(Block):
    """The parts of a block, put together in another way."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop_path(self.attn(x)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class WeightsToo(Attention):
    """As some repositories change it: the attention's weights are returned beside the output."""

    def forward(self, x: Tensor):
        return super().forward(x), None


class Signed(Attention):
    """The same parts and almost the same formula."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Masked(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class NeedsMore(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.temperature * super().forward(x)


class TrainingOnly(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


@pytest.mark.parametrize("attention", [Signed, Masked, TrainingOnly])
def test_an_attention_that_computes_something_else_is_not_mistaken_for_ours(attention: type[nn.Module]) -> None:
    model, x = deit3(attention=attention), images()
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert_close(model(x), stock)
    assert type(model.blocks[0].attn) is attention
    assert report.kept["blocks.0"] == f"attn is a {attention.__module__}.{attention.__name__}"
    assert "blocks.0.norm1" in report.swapped


@pytest.mark.parametrize("attention", [WeightsToo, NeedsMore])
def test_an_attention_that_fails_on_a_stand_in_is_left_alone(attention: type[nn.Module]) -> None:
    model = deit3(attention=attention)
    swap(model)
    assert type(model.blocks[0].attn) is attention


def test_a_block_that_computes_something_else_is_not_mistaken_for_ours() -> None:
    model, x = deit3(block=PostNormBlock), images()
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert_close(model(x), stock)
    assert type(model.blocks[0]) is PostNormBlock
    assert "blocks.0" not in report.swapped and "blocks.0.attn" in report.swapped


def test_recognising_a_class_draws_no_random_numbers() -> None:
    class Fresh(LayerScaleBlock):
        pass

    model = deit3(block=Fresh)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with swapped(model):
        assert torch.equal(torch.rand(1), expected)


def test_a_swapped_model_compiles_whole() -> None:
    model, x = deit3(), images()
    with torch.no_grad():
        stock = model(x)
        swap(model)
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), stock)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_swapped_model_can_be_scripted() -> None:
    attention, x = randomise(Attention(64, 2)).eval(), torch.randn(2, 5, 64)
    swap(attention)
    assert_close(torch.jit.script(attention)(x), attention(x))


def test_a_forward_rewritten_on_the_instance_after_the_swap_is_obeyed() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    model, x = randomise(DistilledVisionTransformer(**options)).eval(), images()
    stock = copy.deepcopy(model)
    swap(model)
    model(x)

    def averaged(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed[:, 2:]
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1), self.norm(x)[:, -1]

    for each in (model, stock):
        each.forward_features = MethodType(averaged, each)
    with torch.inference_mode():
        assert_close(model(x), stock(x))


class Flagged(DeiT3):
    average = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.average else x[:, 0])


@pytest.mark.parametrize("on", ["class", "instance"])
def test_a_flag_that_the_forward_reads_is_read_at_each_call(on, monkeypatch) -> None:
    model, x = randomise(Flagged()).eval(), images()
    stock = copy.deepcopy(model)
    swap(model)
    with torch.inference_mode():
        assert operator_calls(lambda: model(x)) == block_calls(2)
        for value in (True, False):
            for each in (model, stock):
                monkeypatch.setattr(Flagged if on == "class" else each, "average", value)
            assert_close(model(x), stock(x))
    assert operator_calls(lambda: model(x)) == block_calls(2)


READS_AVERAGE = False


def pooled(x: Tensor) -> Tensor:
    return x.mean(1) if READS_AVERAGE else x[:, 0]


class Pooled(DeiT3):
    """Reads rows through a property and a function of its file."""

    settings = (False,)

    @property
    def averages(self) -> bool:
        return self.settings[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.averages else pooled(x))


@pytest.mark.parametrize("change", ["property", "global", "function"])
def test_what_a_forward_reads_by_way_of_others_is_read_at_each_call(change, monkeypatch) -> None:
    model, x = randomise(Pooled()).eval(), images()
    stock = copy.deepcopy(model)
    swap(model)
    module = sys.modules[__name__]
    with torch.inference_mode():
        assert operator_calls(lambda: model(x)) == block_calls(2)
        if change == "property":
            model.settings = stock.settings = (True,)
        elif change == "global":
            monkeypatch.setattr(module, "READS_AVERAGE", True)
        else:
            monkeypatch.setattr(module, "pooled", lambda x: x.mean(1))
        assert_close(model(x), stock(x))


def test_a_copy_reads_the_same_globals(monkeypatch) -> None:
    model, x = randomise(Pooled()).eval(), images()
    stock = copy.deepcopy(model)
    swap(model)
    twin = copy.deepcopy(model)
    monkeypatch.setattr(sys.modules[__name__], "READS_AVERAGE", True)
    with torch.inference_mode():
        assert_close(twin(x), stock(x))


class ListedSettings(Pooled):
    """What is in a list may change where nobody sees it."""

    settings = [False]  # noqa: RUF012


def test_a_model_that_reads_a_list_gets_every_row() -> None:
    model, x = randomise(ListedSettings()).eval(), images()
    swap(model)
    assert operator_calls(lambda: model(x)) == block_calls(2, readout=False)


def sum(x: Tensor) -> Tensor:
    return 2 * x


class NamedLikePythons(Attention):
    """Calls a function that may be another tomorrow."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(0.5 * self.proj(self.qkv(x)[..., : x.shape[-1]]))


def test_a_function_named_like_one_of_pythons_is_not_taken_for_it() -> None:
    assert not only_computes(NamedLikePythons.forward, {"proj", "qkv"})


class Tempered(Attention):
    """Reads what an instance has none of, and a class may change."""

    temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.temperature * super().forward(x)


def test_an_attention_that_reads_more_than_its_parts_is_left_alone() -> None:
    model = deit3(attention=Tempered)
    swap(model)
    assert type(model.blocks[0].attn) is Tempered


def test_swapping_while_others_call_the_model_changes_no_answer() -> None:
    model, x = deit3(), images()
    with torch.inference_mode():
        stock = model(x)
    stop, wrong = threading.Event(), []

    def call() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                result = model(x)
                if not torch.allclose(result, stock, atol=1e-4):
                    wrong.append(result)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for _ in range(10):
        swap(model)
        restore(model)
    stop.set()
    for caller in callers:
        caller.join()
    assert not wrong
