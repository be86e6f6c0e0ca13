import copy

import torch

from deit_fast import nn as fast
from tests.nn.helpers import HEADS, WIDTH


def test_a_block_can_be_copied_and_moved():
    block = fast.Block(WIDTH, HEADS).eval()
    x = torch.randn(1, 5, WIDTH)
    twin = copy.deepcopy(block).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(twin(x.bfloat16()).float(), block(x), atol=0.05, rtol=0.05)
