"""`attn_implementation="deit_fast"`."""

import copy
import inspect

import pytest
import torch
from torch import nn

import deit_fast
from tests.swap.helpers import assert_close, assert_same_gradients, gradients, operator_calls

transformers = pytest.importorskip("transformers")
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

import deit_fast.transformers  # noqa: E402  (registers it)
from tests.swap.transformers_models import assert_outputs_close, pixels  # noqa: E402
from tests.transformers.models import ours, stock  # noqa: E402

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TOKENS = torch.arange(12).reshape(2, 6)


def models(config: object, auto: type = transformers.AutoModel) -> list[nn.Module]:
    """With the same weights: one with our attention, one with sdpa."""
    found = []
    for name in ("deit_fast", "sdpa"):
        torch.manual_seed(0)
        found.append(auto.from_config(copy.deepcopy(config), attn_implementation=name).eval())
    return found


def attention_calls(model: nn.Module, *args: object, **kwargs: object) -> int:
    return operator_calls(lambda: model(*args, **kwargs))["attention"]


@pytest.mark.parametrize("class_name", ["DeiTForImageClassification", "ViTForImageClassification"])
def test_a_stock_model_computes_attention_alone_with_the_operator(class_name: str) -> None:
    x = pixels()
    model, expected = (stock(class_name, attn_implementation=name).train() for name in ("deit_fast", "sdpa"))
    assert dict(operator_calls(lambda: model(x))) == {"attention": 2}
    result, control = model(x), expected(x)
    assert_outputs_close(result, control)
    assert_same_gradients(
        gradients(model, result.logits.square().sum()), gradients(expected, control.logits.square().sum())
    )


def test_it_can_be_set_later_and_compiles() -> None:
    model, x = stock(), pixels()
    expected = model(x).logits
    model.set_attn_implementation("deit_fast")
    assert attention_calls(model, x) == 2
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x).logits, expected)
    torch.compiler.reset()


def test_the_kernels_give_stocks_answer(triton_backend) -> None:
    model, expected = (stock(attn_implementation=name) for name in ("deit_fast", "sdpa"))
    x = pixels(1)
    with torch.inference_mode():
        assert_close(model(x).logits, expected(x).logits)


def test_a_swapped_layer_is_fused_whole_under_this_name() -> None:
    model, x = ours(attn_implementation="deit_fast"), pixels()
    with torch.inference_mode():
        assert_close(model(x).logits, stock()(x).logits)
    assert not deit_fast.report(model).stock


def test_a_mask_is_obeyed() -> None:
    x, mask = pixels(), torch.ones(2, 18, dtype=torch.bool)
    mask[:, 10:] = False
    model, expected = (stock("DeiTModel", attn_implementation=name) for name in ("deit_fast", "sdpa"))
    assert attention_calls(model, x, attention_mask=mask) == 0
    with torch.inference_mode():
        assert not torch.allclose(model(x).last_hidden_state, model(x, attention_mask=mask).last_hidden_state)
        assert_outputs_close(model(x, attention_mask=mask), expected(x, attention_mask=mask))


def test_dropout_is_drawn_as_sdpa_draws_it() -> None:
    x, results = pixels(), []
    for name in ("deit_fast", "sdpa"):
        model = stock(attn_implementation=name, attention_probs_dropout_prob=0.5).train()
        torch.manual_seed(1)
        results.append(model(x).logits)
    assert torch.equal(*results) and attention_calls(model, x) == 0


def test_padding_is_obeyed_and_other_encoders_use_the_operator() -> None:
    model, expected = models(transformers.BertConfig(vocab_size=32, **SMALL))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with torch.inference_mode():
        for each in (None, mask):
            result, control = (m(TOKENS, attention_mask=each).last_hidden_state for m in (model, expected))
            assert_close(result, control)
    assert attention_calls(model, TOKENS) == 2 and attention_calls(model, TOKENS, attention_mask=mask) == 0


@pytest.mark.parametrize("heads", [2, 1], ids=["causal", "causal with grouped heads"])
def test_causal_models_stay_causal(heads: int) -> None:
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=heads, **SMALL)
    model, expected = models(config, transformers.AutoModelForCausalLM)
    assert attention_calls(model, TOKENS) == 0
    with torch.inference_mode():
        assert_close(model(TOKENS).logits, expected(TOKENS).logits)


class Caller(nn.Module):
    is_causal = False


def call(module: nn.Module | None = None, key_heads: int = 2, **arguments: object) -> tuple[torch.Tensor, int]:
    """The output, and how often the operator was called; beside sdpa's, which must be the same."""
    torch.manual_seed(0)
    query = torch.randn(2, 5, 2, 32).transpose(1, 2)
    key, value = torch.randn(2, 2, 7, key_heads, 32).transpose(2, 3)
    sdpa, own = (transformers.AttentionInterface().get(name) for name in ("sdpa", "deit_fast"))
    given = (module or Caller(), query, key, value, arguments.pop("attention_mask", None))
    calls = operator_calls(lambda: own(*given, **arguments))["attention"]
    out, weights = own(*given, **arguments)
    expected, _ = sdpa(*given, **arguments)
    assert weights is None and out.shape == (2, 5, 2, 32)
    assert_close(out, expected)
    return out, calls


class Grouped(Caller):
    num_key_value_groups = 2


class Silent(nn.Module):
    """sdpa takes a module that does not say so for causal."""


@pytest.mark.parametrize(
    "arguments, calls",
    [
        ({}, 1),
        ({"scaling": 0.3, "dropout": 0.0, "is_causal": False, "use_cache": True}, 1),
        ({"module": Silent(), "is_causal": False}, 1),
        ({"module": Silent()}, 0),
        ({"is_causal": True}, 0),
        ({"attention_mask": torch.rand(2, 1, 5, 7) < 0.8}, 0),
        ({"position_bias": torch.randn(1, 2, 5, 7)}, 0),
        ({"module": Grouped(), "key_heads": 1}, 0),
    ],
    ids=["plain", "all said", "not causal", "causal unsaid", "causal", "mask", "position bias", "grouped"],
)
def test_a_call_that_asks_for_more_goes_to_sdpa(arguments: dict, calls: int) -> None:
    assert call(**arguments)[1] == calls


@pytest.mark.skipif(
    "softcap" not in inspect.getsource(sdpa_attention_forward), reason="this release of transformers refuses nothing"
)
def test_what_sdpa_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="does not support `softcap`"):
        call(softcap=30.0)
