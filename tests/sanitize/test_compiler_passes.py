"""No compiler pass changes what a kernel computes: the module after each is executed and compared with the first.

The passes are those down to the GPU's data layouts (TTGIR), for a small launch of each kernel. What LLVM and ptxas
make of it is not executed.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from ttsem import harness, minimize, mlir, validate

from deit_fast import kernels
from tests.sanitize import cases
from tests.sanitize.cases import BFLOAT16, Arguments, SanitizerCase
from tests.sanitize.check import outputs_and_gradients
from tests.sanitize.session import CAPABILITIES, sanitized

# An operator that launches it, forward or backward.
LAUNCHED_BY = {
    "attention_kernel": cases.attention,
    "key_gradient_kernel": cases.attention,
    "query_gradient_kernel": cases.attention,
    "keep_samples_kernel": cases.keep_samples,
    "layer_norm_kernel": cases.layer_norm,
    "column_sums_kernel": cases.layer_norm,
    "layer_norm_backward_kernel": cases.layer_norm,
    "sum_splits_kernel": cases.layer_norm,
    "persistent_linear_kernel": cases.linear_residual_persistent,
    "linear_kernel": cases.layer_norm_linear,
    "finish_layer_norm_linear_kernel": cases.layer_norm_linear,
    "branch_gradient_kernel": cases.linear_residual,
    "finish_linear_kernel": cases.linear_residual,
    "input_gradient_kernel": cases.linear_residual,
    "scaled_weight_kernel": cases.linear_residual,
    "weight_gradient_kernel": cases.linear_residual,
    "distillation_loss_kernel": cases.soft_distillation,
    "mlp_kernel": cases.mlp,
    "normalise_pixels_kernel": cases.normalise_pixels,
    "patch_embed_kernel": cases.patch_embed,
    "image_gradient_kernel": cases.patch_embed,
    "patch_weight_gradient_kernel": cases.patch_embed,
    "sum_partials_kernel": cases.patch_embed,
    "token_gradients_kernel": cases.patch_embed,
    "readout_kernel": cases.readout_attention,
    "readout_backward_kernel": cases.readout_attention,
    "epilogue_kernel": cases.linear_residual_by_vendor,
    "input_gradient_epilogue_kernel": cases.fc2_residual_by_vendor,
}


def kernel_names() -> list[str]:
    """Every kernel of the package."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(kernels.__path__, "deit_fast.kernels.")]
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", kernel_names())
def test_no_pass_changes_the_kernel(name, capability):
    if name == "persistent_linear_kernel" and capability < 90:
        pytest.skip("this GPU has no tensor descriptors")
    case = SanitizerCase(LAUNCHED_BY[name], BFLOAT16, False, "contiguous", 1, 17, 64, None, capability)
    with sanitized(capability), _first_launch_of(name) as records:
        outputs_and_gradients(Arguments(case))
    stages = _stages(records[0], capability)
    assert len(stages) > 3, "hardly any pass has been seen to change the module"
    report = validate.validate_stages(records[0], stages)
    undecided = [p for p in report.passes if p.verdict not in ("match", "approx", "mismatch")]
    assert report.first_bad_pass is None, "\n".join(validate.summary_lines(report))
    assert not undecided, [(p.pass_name, p.verdict, p.unsupported, p.message) for p in undecided]


@contextmanager
def _first_launch_of(name: str) -> Iterator[list[harness.LaunchRecord]]:
    """Keeps the first launch of the kernel, with what the sanitizer computed for it."""
    records: list[harness.LaunchRecord] = []
    execute = harness.execute

    def executing(record: harness.LaunchRecord, *args, **named) -> harness.Execution:
        execution = execute(record, *args, **named)
        if record.fn.fn.__name__ == name and not records:
            record.post = {buffer: execution.buffer(record, buffer) for buffer in record.pre}
            records.append(record)
        return execution

    with patch.object(harness, "execute", executing):
        yield records


def _stages(record: harness.LaunchRecord, capability: int) -> list[tuple[str, str]]:
    """(pass, the module it is given), where that is another module than the pass before was given."""
    target = harness.target_for("cpu", capability)

    def to_layouts(fn, args, kwargs, target):
        # As far as ttsem executes: what follows would print LLVM modules of a hundred times the size.
        harness._stage_text(SimpleNamespace(fn=fn, args=args, kwargs=kwargs, fn_name=fn.__name__), "ttgir", target)

    mlir.enable_generic_printing()
    with patch.object(harness, "_compile_asm", to_layouts):
        stages = validate.split_dump(harness.dump_for_launch(record, target))
    distinct = {minimize.strip_locs(text): (name, text) for name, text in reversed(stages)}
    return list(reversed(distinct.values()))
