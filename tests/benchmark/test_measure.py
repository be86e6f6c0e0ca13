import sys
import warnings
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from deit_fast.benchmark import measure as module
from deit_fast.benchmark.contenders import CONTENDERS, Contender, ModelCase, recipe_drop_path
from deit_fast.benchmark.measure import measure, stock_calls
from deit_fast.ops import backend
from deit_fast.swap import swap

CPU = torch.device("cpu")
CASE = ModelCase("deit_tiny_distilled_patch16_224", batch=3, img_size=32)


class Clock:
    """Calls once a timing; the n-th timing takes n seconds."""

    def __init__(self) -> None:
        self.timings = 0

    def calls(self, call) -> int:
        call()
        return 1

    def seconds(self, call, calls: int) -> float:
        call()
        self.timings += 1
        return float(self.timings)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """timm's models with two blocks."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))


def rows(case: ModelCase, contenders: list[Contender], rounds: int = 2, clock=None) -> dict:
    return {row.contender: row for row in measure(case, contenders, CPU, clock or Clock(), rounds, lambda _: None)}


def named(*names: str) -> list[Contender]:
    return [CONTENDERS[name] for name in names]


@pytest.mark.parametrize("training", [False, True])
def test_stock_and_swapped_are_checked_counted_and_timed_in_turn(training):
    case = replace(CASE, training=training, drop_path=0.5 if training else 0.0)
    found = rows(case, named("timm", "timm, explicit attention", "deit_fast"), rounds=3)
    assert [row.failure for row in found.values()] == [None] * 3
    # Another one begins each round.
    assert [row.seconds for row in found.values()] == [[1.0, 6.0, 8.0], [2.0, 4.0, 9.0], [3.0, 5.0, 7.0]]
    timm, ours = found["timm"], found["deit_fast"]
    assert ours.flops < ours.stock_flops == timm.flops == timm.stock_flops
    assert ours.operator_calls < timm.operator_calls
    assert (ours.saved_bytes or 0) <= (timm.saved_bytes or 0)
    assert (timm.saved_bytes is not None) is training
    assert 0 < ours.error < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_transformers_models_are_checked_against_themselves(training):
    found = rows(replace(CASE, training=training), named("transformers, eager", "transformers, sdpa"), rounds=1)
    assert [row.failure for row in found.values()] == [None] * 2


@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"amp": "bfloat16"}])
def test_16_bit_models_are_checked_by_their_own_rounding(precision):
    found = rows(replace(CASE, **precision), named("timm", "deit_fast"), rounds=1)
    assert [row.failure for row in found.values()] == [None] * 2
    assert found["deit_fast"].error > 1e-4


def test_a_contender_that_computes_something_else_is_not_timed():
    def wrong(case: ModelCase) -> nn.Module:
        model = CONTENDERS["timm"].build(case)
        model.norm.eps = 0.1
        return model

    found = rows(CASE, [*named("timm"), Contender("wrong", ("timm",), wrong, stock="timm")])
    assert found["wrong"].failure.startswith("ArithmeticError: wrong: error")
    assert found["wrong"].seconds == []
    assert len(found["timm"].seconds) == 2


def test_what_needs_a_gpu_is_not_run_without():
    assert CONTENDERS["deit_fast, CUDA graphs"].missing(CPU) == "it needs a GPU"
    assert CONTENDERS["deit_fast, CUDA graphs"].missing(torch.device("cuda")) is None


def test_where_memory_runs_out_the_others_go_on():
    class Full(Clock):
        def seconds(self, call, calls: int) -> float:
            if self.timings == 1:
                self.timings += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return super().seconds(call, calls)

    found = rows(CASE, named("timm", "timm, explicit attention"), rounds=3, clock=Full())
    assert found["timm, explicit attention"].failure == "out of memory at batch 3"
    assert found["timm, explicit attention"].seconds == []
    assert len(found["timm"].seconds) == 3


def test_the_recipes_have_their_drop_path():
    assert recipe_drop_path("deit_small_distilled_patch16_224") == 0.1
    assert recipe_drop_path("deit3_large_patch16_224") == 0.45
    assert recipe_drop_path("vit_small_patch16_224") == 0.0


def test_deit_iii_has_one_rate_in_every_block_and_deit_a_rising_one():
    def rates(model: str) -> list[float]:
        built = CONTENDERS["timm"].build(ModelCase(model, 1, 32, training=True, drop_path=0.2))
        return [getattr(block.drop_path2, "drop_prob", 0.0) for block in built.blocks]

    assert rates("deit_tiny_patch16_224") == [0.0, pytest.approx(0.2)]
    assert rates("deit3_small_patch16_224") == [0.2, 0.2]


def linear(case: ModelCase) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * case.img_size**2, 1000))


LINEAR = Contender("timm", (), linear)
BROKEN = Contender("broken", (), lambda case: nn.Linear(-1, 1))
COMPILED = replace(LINEAR, name="timm, compiled", compiled="default")


@pytest.fixture
def graphs(monkeypatch):
    """Counts what dynamo traces; nothing is generated from it."""
    counter = CompileCounter()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode, dynamic: compiled(call, backend=counter, dynamic=dynamic))
    yield counter
    torch._dynamo.reset()


def test_many_cases_are_each_compiled(graphs):
    """All models share one forward, for which dynamo keeps 8 graphs and then runs it eager."""
    for batch in range(3, 13):
        assert rows(replace(CASE, batch=batch), [COMPILED], rounds=1)["timm, compiled"].failure is None
    # What was checked, and what was timed.
    assert graphs.frame_count == 10 * 2


def test_a_contender_that_dynamo_would_run_eager_is_not_timed(graphs):
    with torch._dynamo.config.patch(recompile_limit=1):
        found = rows(CASE, [LINEAR, COMPILED], rounds=1)
    assert found["timm, compiled"].failure.startswith("FailOnRecompileLimitHit")
    assert found["timm, compiled"].seconds == [] and found["timm"].failure is None


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for flash-attn's ViT, with its signature, timm's parts, and kernels for 16 bits only."""
    from timm.models import vision_transformer

    built: list[dict] = []

    class VisionTransformer(vision_transformer.VisionTransformer):
        def __init__(
            self, img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool="token", embed_dim=768,
            depth=12, num_heads=12, mlp_ratio=4.0, qkv_bias=True, init_values=None, class_token=True,
            no_embed_class=False, pre_norm=False, fc_norm=None, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0,
            weight_init="", embed_layer=None, norm_layer=None, act_layer=None, use_flash_attn=False,
            fused_bias_fc=False, fused_mlp=False, fused_dropout_add_ln=False,
        ) -> None:  # fmt: skip
            built.append(locals())
            super().__init__(
                img_size, patch_size, in_chans, num_classes, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
                mlp_ratio=mlp_ratio, no_embed_class=no_embed_class, drop_path_rate=drop_path_rate,
            )  # fmt: skip

        def forward(self, x):
            assert x.dtype is torch.bfloat16, "FlashAttention only supports fp16 and bf16"
            return super().forward(x)

    for name in ("flash_attn", "flash_attn.models", "flash_attn.models.vit"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flash_attn.models.vit"].VisionTransformer = VisionTransformer
    return built


@pytest.mark.parametrize("training", [False, True])
def test_flash_attns_vit_is_built_by_its_signature_and_held_to_timms(training, flash_attn):
    case = replace(CASE, dtype="bfloat16", training=training, drop_path=0.1 if training else 0.0)
    row = rows(case, [replace(CONTENDERS["flash-attn ViT"], gpu_only=False)])["flash-attn ViT"]
    assert row.failure is None and len(row.seconds) == 2
    assert 1e-4 < row.error < 1e-1
    # It can't be run on the CPU, where is counted.
    assert row.flops is None and row.operator_calls is None
    built = flash_attn[0]
    assert (built["img_size"], built["patch_size"], built["embed_dim"], built["depth"]) == (32, 16, 192, 2)
    assert (built["num_heads"], built["mlp_ratio"], built["drop_path_rate"]) == (3, 4.0, case.drop_path)
    assert built["use_flash_attn"] and not built["fused_mlp"]


def test_what_flash_attns_vit_has_not_is_said(flash_attn):
    case = replace(CASE, model="deit3_small_patch16_224", dtype="bfloat16")
    row = rows(case, [CONTENDERS["flash-attn ViT"]])["flash-attn ViT"]
    assert row.failure == "ValueError: flash-attn's ViT has no LayerScale"


def test_a_cpus_memory_runs_out_too():
    """Its allocator raises no error of its own kind."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert backend.ran_out_of_memory(caught.value)
    assert not backend.ran_out_of_memory(RuntimeError("expected another shape"))


def test_an_interrupted_case_keeps_its_whole_rounds():
    class Stopped(Clock):
        def seconds(self, call, calls: int) -> float:
            if self.timings == 5:
                raise KeyboardInterrupt
            return super().seconds(call, calls)

    found = []
    with pytest.raises(KeyboardInterrupt):
        for row in measure(CASE, [LINEAR, replace(LINEAR, name="other"), BROKEN], CPU, Stopped(), 9, lambda _: None):
            found.append(row)
    assert [(row.contender, row.seconds) for row in found] == [
        ("timm", [1.0, 4.0]),
        ("other", [2.0, 3.0]),
        ("broken", []),
    ]


def test_a_case_interrupted_in_its_first_round_leaves_only_failures():
    class Stopped(Clock):
        def seconds(self, call, calls: int) -> float:
            raise KeyboardInterrupt

    found = []
    with pytest.raises(KeyboardInterrupt):
        for row in measure(CASE, [LINEAR, BROKEN], CPU, Stopped(), 9, lambda _: None):
            found.append(row)
    assert [row.contender for row in found] == ["broken"]


def test_peak_memory_is_the_contenders_own(monkeypatch):
    """On a stand-in for a GPU's allocator: 1000 bytes are there before, a model takes 100, a step 10 beside."""
    memory = {"now": 1000, "most": 1000}

    class Takes(Clock):
        def calls(self, call) -> int:
            memory["most"] = max(memory["most"], memory["now"] + 10)
            return super().calls(call)

    def build(case: ModelCase) -> nn.Module:
        memory["now"] += 100 if case.batch == CASE.batch else 0
        return linear(case)

    def restarted(device) -> int:
        memory["most"] = memory["now"]
        return memory["now"]

    monkeypatch.setattr(module, "_allocated", lambda device: memory["now"])
    monkeypatch.setattr(module, "_restart_peak", restarted)
    monkeypatch.setattr(module, "_peak", lambda device: memory["most"])
    monkeypatch.setattr(module, "count", lambda *_: None)
    found = rows(CASE, [replace(LINEAR, name=name, build=build) for name in ("timm", "other")], clock=Takes())
    assert [row.peak_bytes for row in found.values()] == [110, 110]


def test_a_small_rate_of_drop_path_shows_in_the_flops(monkeypatch):
    monkeypatch.undo()  # the whole depth

    def flops(rate: float) -> int:
        row = module.Row(replace(CASE, training=True, drop_path=rate), "deit_fast")
        module.count(row, CONTENDERS["deit_fast"], row.case)
        return row.flops

    # The rate rises from 0 to 0.1 and spares the patch embedding and the heads.
    assert flops(0.1) / flops(0.0) == pytest.approx(0.95, abs=0.01)


def test_where_stock_operators_answer_the_row_says_so(monkeypatch):
    """Each row for itself, though a warning is given once."""
    monkeypatch.setattr(backend, "said", set())
    failure = backend.Failure("mlp", "batch 2", torch.device("cpu"), "no such GPU")
    monkeypatch.setattr(backend, "failed", {("mlp", "this call"): failure})

    class Falls(nn.Sequential):
        def forward(self, x):
            backend.warn_fallback("attention", "no kernel for it")
            assert backend.has_failed("mlp", "this call")
            return super().forward(x)

    def build(case: ModelCase) -> nn.Module:
        return Falls(*linear(case))

    contenders = [LINEAR, *(Contender(name, (), build) for name in ("deit_fast", "deit_fast, tuned"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rows(CASE, contenders, rounds=1)
    assert found["timm"].fallbacks == []
    for name in ("deit_fast", "deit_fast, tuned"):
        assert found[name].fallbacks == [
            "deit_fast.attention: no kernel for it; using the stock PyTorch operators",
            "deit_fast.mlp: its kernels failed (no such GPU); using the stock PyTorch operators",
        ]


def test_where_a_swapped_model_runs_as_stock_the_row_says_so():
    from timm.models.vision_transformer import Block

    model = nn.Sequential(Block(32, 1))
    swap(model)
    model(torch.randn(1, 3, 32))
    assert stock_calls(model) == []
    model[0].attn.register_forward_hook(lambda *_: None)
    model(torch.randn(1, 3, 32))
    assert stock_calls(model)[0] == "0 ran as stock: attn has a hook"
