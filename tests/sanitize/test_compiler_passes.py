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
from triton.runtime.jit import JITFunction
from ttsem import harness, minimize, mlir, validate

from deit_fast import kernels
from tests.sanitize import cases
from tests.sanitize.cases import BFLOAT16, Arguments, Case
from tests.sanitize.check import outputs_and_gradients
from tests.sanitize.session import CAPABILITIES, sanitized

# An operator that launches it, forward or backward.
LAUNCHED_BY = {
    "attention.attention_kernel": cases.attention,
    "attention_backward.key_gradient_kernel": cases.attention,
    "attention_backward.query_gradient_kernel": cases.attention,
    "drop_path.keep_samples_kernel": cases.keep_samples,
    "layer_norm.layer_norm_kernel": cases.layer_norm,
    "layer_norm_backward.column_sums_kernel": cases.layer_norm,
    "layer_norm_backward.layer_norm_backward_kernel": cases.layer_norm,
    "layer_norm_backward.sum_splits_kernel": cases.layer_norm,
    "linear.linear_kernel": cases.layer_norm_linear,
    "linear_backward.finish_layer_norm_linear_kernel": cases.layer_norm_linear,
    "linear_backward.finish_linear_kernel": cases.linear_residual,
    "linear_backward.input_gradient_kernel": cases.linear_residual,
    "linear_backward.weight_gradient_kernel": cases.linear_residual,
    "loss.distillation_loss_kernel": cases.soft_distillation,
    "mlp.mlp_kernel": cases.mlp,
    "patch_embed.patch_embed_kernel": cases.patch_embed,
    "patch_embed_backward.image_gradient_kernel": cases.patch_embed,
    "patch_embed_backward.patch_weight_gradient_kernel": cases.patch_embed,
    "patch_embed_backward.sum_partials_kernel": cases.patch_embed,
    "patch_embed_backward.token_gradients_kernel": cases.patch_embed,
    "readout.readout_kernel": cases.readout_attention,
    "readout_backward.readout_backward_kernel": cases.readout_attention,
    "vendor_gemm.residual_kernel": cases.linear_residual_by_vendor,
}


def kernel_names() -> list[str]:
    """Every kernel of the package, by module."""
    names = []
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel") and _name(value) == f"{module.name}.{name}":
                names.append(f"{module.name}.{name}")
    return names


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", kernel_names())
def test_no_pass_changes_the_kernel(name, capability):
    case = Case(LAUNCHED_BY[name], BFLOAT16, False, "contiguous", 1, 17, 64, None, capability)
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
        if _name(record.fn) == name and not records:
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
