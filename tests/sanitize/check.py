"""Runs an operator of the table, forward and backward, and compares what it wrote with stock PyTorch in float64."""

import torch
from torch import Tensor

from deit_fast.ops import backend
from tests.sanitize.cases import Arguments, SanitizerCase
from tests.sanitize.session import sanitized

# Of the largest element of all results: some gradients are zero but for rounding. Loose, since other tests ask how
# exact a kernel is, and this one whether it read what is NaN.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check(case: SanitizerCase) -> None:
    """Raises `KernelFault` or `AssertionError` where a launch of the case is at fault."""
    autocast = torch.autocast("cpu", case.dtype, enabled=case.autocast)
    with sanitized(case.capability) as session, autocast:
        ours = outputs_and_gradients(Arguments(case))
    assert session.launches or not case.batch
    with backend.forced("torch"):
        exact = outputs_and_gradients(Arguments(case, exact=True))
    assert len(ours) == len(exact)
    allowed = TOLERANCE[case.dtype] * max([1.0, *(t.abs().max().item() for t in exact if t.numel())])
    for i, (mine, truth) in enumerate(zip(ours, exact, strict=True)):
        torch.testing.assert_close(
            mine.double(),
            truth.double(),
            rtol=0,
            atol=allowed,
            equal_nan=True,
            msg=lambda message, i=i: f"{case}: result {i} (outputs, then gradients): {message}",
        )


def outputs_and_gradients(arguments: Arguments) -> list[Tensor]:
    results = arguments.case.op(arguments)
    results = [results] if isinstance(results, Tensor) else list(results)
    outputs = [result for result in results if result.requires_grad]
    if not outputs:
        return results
    gradients = torch.autograd.grad(outputs, arguments.leaves, arguments.cotangents(outputs), allow_unused=True)
    return [result.detach() for result in results] + [gradient for gradient in gradients if gradient is not None]
