import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deit_fast import ops
from deit_fast.kernels import mlp as kernels
from deit_fast.kernels.launching import hardware
from deit_fast.ops import backend
from tests.support.compare import BATCHES, DTYPES, TOKENS, assert_op_is_right, randn, strided

EPS = 1e-6


@pytest.fixture(autouse=True)
def of_a_gpu_that_takes_it_whole(monkeypatch):
    monkeypatch.setattr(kernels, "_ARCHITECTURES", frozenset({"sm_89", "sm_90", "sm_120"}))


def arguments(batch, tokens, width, hidden, dtype, *, layer_scale=True, drop_path=True, activation="gelu"):
    return (
        randn(batch, tokens, width, dtype=dtype),
        randn(width, dtype=dtype),
        randn(width, dtype=dtype),
        EPS,
        randn(hidden, width, dtype=dtype, scale=width**-0.5),
        randn(hidden, dtype=dtype),
        randn(width, hidden, dtype=dtype, scale=hidden**-0.5),
        randn(width, dtype=dtype),
        randn(width, dtype=dtype) if layer_scale else None,
        randn(batch, dtype=dtype) if drop_path else None,
        activation,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens, dtype):
    assert_op_is_right("mlp", *arguments(1, tokens, 64, 96, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 50, 64, 128, 192, 200, 256])
@pytest.mark.parametrize("whole", [True, False])
def test_any_width_in_one_kernel_or_several(width, whole, dtype, monkeypatch):
    if not whole:
        monkeypatch.undo()
    assert_op_is_right("mlp", *arguments(2, 9, width, 4 * width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "none"])
def test_any_batch_and_activation(batch, activation, dtype):
    assert_op_is_right("mlp", *arguments(batch, 5, 64, 100, dtype, activation=activation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_residual(dtype):
    assert_op_is_right("mlp", *arguments(2, 9, 192, 192, dtype, layer_scale=False, drop_path=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    x, *rest = arguments(2, 9, 64, 80, dtype)
    rest = [strided(a) if isinstance(a, torch.Tensor) else a for a in rest]
    assert_op_is_right("mlp", strided(x), *rest)
    assert_op_is_right("mlp", x[:1].expand(2, 9, 64), *rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_spoil_their_own_rows_only(dtype):
    x, *rest = arguments(1, 6, 80, 64, dtype)
    x[0, 1, 3], x[0, 2, 5] = torch.nan, torch.inf
    y = assert_op_is_right("mlp", x, *rest)[0]
    assert y.isnan().any(dim=-1).tolist() == [[False, True, True, False, False, False]]


@pytest.mark.parametrize(
    ("width", "arch", "fits"),
    [(192, "sm_89", True), (192, "sm_120", True), (384, "sm_89", False), (192, "sm_90", False), (64, "gfx942", False)],
)
def test_it_is_one_kernel_where_the_hidden_layers_bytes_cost_most(width, arch, fits, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "architecture_of", lambda _: arch)
    with backend.forced("triton"):
        assert ops.mlp_fits(torch.empty(2, 3, width)) is fits
    assert not ops.mlp_fits(torch.empty(2, 3, width)), "on a CPU"


def test_a_fake_tensor_on_a_gpu_that_is_not_there_asks_no_driver(monkeypatch):
    monkeypatch.setattr(hardware, "interpreted", lambda: False)
    with FakeTensorMode(), backend.forced("triton"), torch.no_grad():
        assert ops.mlp_fits(torch.empty(2, 3, 192, device="cuda")) is False


@pytest.mark.parametrize("dynamic", [False, True])
def test_whether_it_is_one_is_decided_once_for_a_graph(dynamic, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "architecture_of", lambda _: "sm_89")
    compiled = torch.compile(
        lambda x: x + 1 if ops.mlp_fits(x) else x, backend="eager", fullgraph=True, dynamic=dynamic
    )
    with backend.forced("triton"):
        assert compiled(torch.zeros(2, 3, 64)).count_nonzero()
        assert compiled(torch.zeros(2, 3, 64)).count_nonzero() and not compiled(torch.zeros(2, 3, 384)).count_nonzero()


def test_widths_that_do_not_fit_are_named():
    x, *rest = arguments(2, 3, 8, 16, torch.float32)
    rest[5] = torch.ones(8, 15)
    with pytest.raises(ValueError, match=r"fc2_weight must have shape \(out_features, 16\)"):
        ops.mlp(x, *rest)
