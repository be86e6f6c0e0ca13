import pytest
import torch
from timm.models import vision_transformer as timm_vit

from deit_fast import nn as fast
from tests.nn.helpers import PAIRS, WIDTH, same_weights


@pytest.mark.parametrize("kind", ["block", "layer scale block"])
def test_training_draws_the_same_drop_path_and_gives_the_same_gradients(kind):
    ours_type, stock_type, arguments = PAIRS[kind]
    ours, stock = ours_type(**arguments, drop_path=0.4), stock_type(**arguments, drop_path=0.4)
    same_weights(ours, stock)
    x = torch.randn(8, 5, WIDTH)
    results = []
    for module in (ours, stock):
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append([y, inputs.grad, *(p.grad for p in module.parameters()), torch.rand(1)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drop_path_under_autocast_has_the_stock_masks_and_values(dtype):
    arguments = PAIRS["layer scale block"][2] | {"drop_path": 0.3}
    ours, stock = fast.Block(**arguments), timm_vit.Block(**arguments)
    same_weights(ours, stock)
    x = torch.randn(8, 5, WIDTH)
    outputs = []
    for module in (ours, stock):
        torch.manual_seed(3)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            outputs.append(module(x))
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, atol=0.02, rtol=0.02)
