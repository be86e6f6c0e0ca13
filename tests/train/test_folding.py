"""BatchNorm is folded where that is exact, and left where it isn't."""

import pytest
import timm
import torch
from torch import nn

from deit_fast.train.folding import folded

SHAPE = (3, 32, 32)


def lived_in(model: nn.Module) -> nn.Module:
    """As if trained: no norm is the identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 2)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_()
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["test_resnet", "regnety_002", "test_efficientnet"])
def test_convolutions_take_every_batch_norm(name):
    model = lived_in(timm.create_model(name))
    fused, images = folded(model, SHAPE), torch.randn(2, *SHAPE)
    assert norms(model) > 0 and norms(fused) == 0
    with torch.no_grad():
        assert torch.allclose(fused(images), model(images), rtol=1e-4, atol=1e-4 * model(images).abs().max())


def test_the_draws_of_training_are_not_touched():
    model, before = timm.create_model("test_resnet").eval(), torch.get_rng_state()
    folded(model, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


class Twice(nn.Module):
    """A convolution that something beside its norm reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        made = self.conv(images)
        return (self.norm(made) + made).mean((2, 3))


def test_a_model_that_would_answer_otherwise_stays_as_it_is():
    model = lived_in(Twice())
    assert folded(model, SHAPE) is model and norms(model) == 1
    plain = timm.create_model("test_vit")
    assert folded(plain, SHAPE) is plain
