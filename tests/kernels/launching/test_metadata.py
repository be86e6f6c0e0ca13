"""What launches tell profilers agrees with the operators' FLOP formulas, and names every launch."""

import importlib
import pkgutil
from collections import defaultdict

import pytest
import triton

from deit_fast import kernels
from tests.support.compiled import printed_by

# A part of these is the stock operators'; and how many samples are kept no formula knows where nothing has run.
IN_PART = ("readout_attention", "keep_samples")


@pytest.fixture(scope="module")
def seen() -> dict:
    return printed_by("-m", "tests.kernels.launching.metadata_checks")


def test_the_flops_of_an_operators_launches_are_those_of_its_formula(seen):
    checked = [case for case in seen["operators"] if not case["title"].startswith(IN_PART)]
    assert len(checked) > 15
    assert [case["title"] for case in checked if case["told"] != case["formula"]] == []


def test_every_launch_has_a_name_with_its_shape_and_counts_its_bytes(seen):
    launches = [each for case in seen["operators"] for each in case["metadata"]]
    assert len({each["kernel"] for each in launches}) > 18
    for each in launches:
        assert each["bytes"] > 0
        assert each["name"].split()[0] == each["kernel"].removesuffix("_kernel")
        assert each["name"].isascii() and each["symbol"] == each["kernel"]
    assert {each["name"] for each in launches} >= {
        "attention 4x2x18x32 bf16 kept",
        "layer_norm 72x64 bf16 weight+bias",
        "linear 72x192x64 bf16 qkv+bias",
        "linear 72x64x64 bf16 bias+layer_scale+drop_path+residual+kept",
        "patch_embed 64x64x192 bf16 bias+pos_embed",
    }
    # x, weight, bias and y of FC1, two bytes an element; LayerNorm goes before it.
    fc1 = next(case for case in seen["operators"] if case["title"].startswith("layer_norm_linear FC1"))
    assert fc1["metadata"][1]["bytes"] == 2 * (72 * 64 + 256 * 64 + 256 + 72 * 256)
    assert fc1["metadata"][1]["flops16"] == 2 * 72 * 64 * 256


@pytest.mark.parametrize("block", ["plain", "DeiT III", "float16"])
def test_a_blocks_launches_have_one_name_where_they_are_the_same_work(block, seen):
    by_name, by_work = defaultdict(set), defaultdict(set)
    for each in seen["blocks"][block]:
        by_name[each["name"]].add(each["work"])
        by_work[each["work"]].add(each["name"])
    assert len(by_name) > 15
    assert {name: works for name, works in by_name.items() if len(works) > 1} == {}
    assert {work: names for work, names in by_work.items() if len(names) > 1} == {}


def test_every_product_of_a_block_tells_what_it_multiplies_and_what_is_fused(seen):
    rows = 4 * 198
    assert {each["name"] for each in seen["blocks"]["plain"] if "flops16" in each} == {
        f"linear {rows}x1152x384 bf16 bias",
        "attention 4x6x198x64 bf16",
        f"linear {rows}x384x384 bf16 bias+residual",
        f"linear {rows}x1536x384 bf16 bias+gelu+activated",
        f"linear {rows}x384x1536 bf16 bias+residual",
        f"input_gradient {rows}x1536x384 bf16 gelu+activated",
        f"input_gradient {rows}x384x1536 bf16",
        f"input_gradient {rows}x384x384 bf16",
        f"input_gradient {rows}x384x1152 bf16",
        f"weight_gradient 384x1536x{rows} bf16 bias",
        f"weight_gradient 1536x384x{rows} bf16 bias",
        f"weight_gradient 384x384x{rows} bf16 bias",
        f"weight_gradient 1152x384x{rows} bf16 bias",
        "query_gradient 4x6x198x64 bf16",
        "key_gradient 4x6x198x64 bf16",
    }


@pytest.mark.parametrize(("target", "tile", "rows"), [("sm_90", "64x64x64", 4), ("gfx942", "128x64x64", 8)])
def test_a_compiled_kernel_is_named_by_what_is_fused_and_its_tile(target, tile, rows, seen):
    product, other_rows, norm = seen["symbols"][target]
    assert product == other_rows == f"linear_kernel_bias_{tile}"
    assert norm == f"layer_norm_kernel_weight_768x{rows}"


def test_no_two_functions_on_the_device_share_a_name():
    modules = defaultdict(set)
    for module in pkgutil.walk_packages(kernels.__path__, "deit_fast.kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, triton.runtime.KernelInterface):
                modules[value.fn.__name__].add(value.fn.__module__)
    assert len(modules) > 70
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}
