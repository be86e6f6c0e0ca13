"""What leaves the process: exported programs, packages, pickles. The control is the stock model's."""

import copy
import operator
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import deit_fast
from deit_fast.ops import backend
from deit_fast.swap import swap
from tests.swap.helpers import assert_close, assert_same_gradients, gradients, operator_calls, randomise

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")
from tests.swap.original_models import DeiT3  # noqa: E402
from tests.swap.transformers_models import build  # noqa: E402

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: randomise(timm.create_model("deit_tiny_distilled_patch16_224", **SIZE)).eval(),
    "transformers": build,
    "original": lambda: randomise(DeiT3()).eval(),
}
of_every_library = pytest.mark.parametrize("library", MODELS)
either_way = pytest.mark.parametrize("strict", [False, True])


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def pair(library: str) -> tuple[nn.Module, nn.Module]:
    """The same model stock and swapped."""
    stock = MODELS[library]()
    swapped = copy.deepcopy(stock)
    swap(swapped)
    return stock, swapped


def logits(answer: object) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.logits


def exported(model: nn.Module, strict: bool = False, **options: object) -> ExportedProgram:
    return torch.export.export(model, (images(),), strict=strict, **options)


def fused(model: nn.Module, **options: object) -> ExportedProgram:
    """For batches of any size."""
    with deit_fast.fused_export():
        return exported(model, dynamic_shapes=({0: Dim("batch")},), **options)


def targets(program: ExportedProgram) -> list[object]:
    """Without the inputs: their order is that in which they were found."""
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def ours(program: ExportedProgram) -> Counter[str]:
    return Counter(t._opname for t in targets(program) if getattr(t, "namespace", None) == "deit_fast")


def run_without_deit_fast(program: str, *arguments: object) -> str:
    """What `program` prints in a process where this library is not."""
    program = f"import sys, torch; sys.modules['deit_fast'] = None\n{program}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# By default -----------------------------------------------------------------------------------------------------------


@either_way
@of_every_library
def test_the_graph_is_stocks(library: str, strict: bool) -> None:
    stock, swapped = pair(library)
    program, control = (exported(model, strict) for model in (swapped, stock))
    assert targets(program) == targets(control)
    x = images()
    assert torch.equal(logits(program.module()(x)), logits(control.module()(x)))


def test_saved_programs_load_where_this_library_is_not(tmp_path: Path) -> None:
    x = images()
    for library in MODELS:
        stock, swapped = pair(library)
        torch.export.save(exported(swapped), tmp_path / f"{library}.pt2")
        torch.save((x, logits(exported(stock).module()(x))), tmp_path / f"{library}.pt")
    # A program that returns transformers' outputs needs their class.
    program = """
import transformers.models.deit.modeling_deit
for library in sys.argv[2:]:
    x, control = torch.load(f"{sys.argv[1]}/{library}.pt")
    answer = torch.export.load(f"{sys.argv[1]}/{library}.pt2").module()(x)
    print(torch.equal(getattr(answer, "logits", answer), control))
"""
    assert run_without_deit_fast(program, tmp_path, *MODELS).split() == ["True"] * len(MODELS)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="AOTInductor needs a C++ compiler")
def test_an_aotinductor_package_runs_where_this_library_is_not(tmp_path: Path) -> None:
    stock, swapped = pair("timm")
    del stock.blocks[1], swapped.blocks[1]
    x = images()
    package = torch._inductor.aoti_compile_and_package(exported(swapped), package_path=str(tmp_path / "model.pt2"))
    with torch.no_grad():
        torch.save((x, stock(x)), tmp_path / "control.pt")
    program = """
x, control = torch.load(sys.argv[2])
print((torch._inductor.aoti_load_package(sys.argv[1])(x) - control).abs().max().item())
"""
    assert float(run_without_deit_fast(program, package, tmp_path / "control.pt")) < 1e-5


def test_onnx_has_the_operators_of_stock() -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript, which is not installed")
    graphs = []
    for model in pair("timm"):
        graph = torch.onnx.export(model, (images(),), dynamo=True, verbose=False).model.graph
        graphs.append([(node.domain, node.op_type) for node in graph])
    assert graphs[0] == graphs[1]
    # ONNX's own domain, also where the fused operators were asked for: the exporter decomposes them.
    _, swapped = pair("timm")
    graph = torch.onnx.export(fused(swapped), dynamo=True, verbose=False).model.graph
    assert {node.domain for node in graph} == {""}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_static_quantization_finds_the_places_of_stock() -> None:
    """By torch.fx, and by patterns of an exported graph."""
    quantization = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    found = [quantization.prepare_fx(m, get_default_qconfig_mapping("x86"), (images(),)) for m in pair("timm")]
    places = [sum("activation_post_process" in node.name for node in m.graph.nodes) for m in found]
    assert places[0] == places[1] > 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_static_quantization_of_an_exported_graph_finds_the_places_of_stock() -> None:
    pt2e = pytest.importorskip(
        "torchao.quantization.pt2e.quantize_pt2e", reason="needs torchao, which is not installed"
    )
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    places = []
    for model in pair("timm"):
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(exported(model).module(), quantizer)
        places.append(sum("activation_post_process" in node.name for node in prepared.graph.nodes))
    assert places[0] == places[1] > 10


def test_pickled_models_open_where_this_library_is_not(tmp_path: Path) -> None:
    x, expected = images(), []
    for library in MODELS:
        stock, swapped = pair(library)
        torch.save(swapped, tmp_path / f"{library}.model")
        with torch.no_grad():
            torch.save((x, logits(stock(x))), tmp_path / f"{library}.pt")
        expected += ["True", *(type(module).__qualname__ for module in stock.modules())]
    program = """
for library in sys.argv[2:]:
    x, control = torch.load(f"{sys.argv[1]}/{library}.pt")
    model = torch.load(f"{sys.argv[1]}/{library}.model", weights_only=False)
    with torch.no_grad():
        answer = model(x)
    print(torch.equal(getattr(answer, "logits", answer), control))
    print(*(type(module).__qualname__ for module in model.modules()))
"""
    assert run_without_deit_fast(program, tmp_path, *MODELS).split() == expected


# With the fused operators ---------------------------------------------------------------------------------------------


@either_way
@of_every_library
def test_the_fused_operators_are_exported_where_asked_for(library: str, strict: bool) -> None:
    stock, swapped = pair(library)
    with torch.no_grad():
        program = fused(swapped, strict=strict)
        if library == "transformers":
            # It gives its layers a mask where it finds itself exported.
            assert ours(program) == {"patch_embed": 1, "layer_norm": 5, "linear": 4}
        else:
            assert ours(program) == operator_calls(lambda: swapped(images()))
        for x in (images(), images(5)):
            assert_close(logits(program.module()(x)), logits(stock(x)))
    # Nothing of it stays, in the model or here.
    assert targets(exported(swapped, strict)) == targets(exported(stock, strict))


@of_every_library
def test_run_decompositions_gives_a_program_that_needs_this_library_nowhere(library: str) -> None:
    stock, swapped = pair(library)
    with torch.no_grad():
        decomposed = fused(swapped).run_decompositions()
        assert not ours(decomposed)
        for x in (images(), images(5)):
            assert_close(logits(decomposed.module()(x)), logits(stock(x)))


def test_a_saved_fused_program_is_loaded_with_its_operators(tmp_path: Path) -> None:
    stock, swapped = pair("timm")
    program = fused(swapped)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert ours(loaded) == ours(program)
    x = images(3)
    assert_close(loaded.module()(x), stock(x))


def test_a_fused_program_runs_the_kernels_and_has_stocks_gradients() -> None:
    stock, swapped = pair("timm")
    program = fused(swapped).module()
    x = images()
    expected = gradients(stock, stock(x).square().sum())
    with backend.forced("triton"):
        assert_same_gradients(gradients(program, program(x).square().sum()), expected)


def test_exports_are_stock_again_after_an_error() -> None:
    stock, swapped = pair("timm")
    with pytest.raises(ZeroDivisionError), deit_fast.fused_export():
        operator.truediv(1, 0)
    assert targets(exported(swapped)) == targets(exported(stock))
