"""Which settings a GPU gets, by its own architecture, and which GPUs are left to the stock operators."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deit_fast.cli import predict
from deit_fast.kernels import attention
from deit_fast.kernels.launching import hardware, run
from deit_fast.ops import backend
from deit_fast.swap import SwapReport, swap
from tests.ops.test_dispatch import samples
from tests.support.compiled import printed_by
from tests.support.examples import public, tensors


@pytest.fixture(autouse=True)
def nothing_known_yet() -> Iterator[None]:
    """Of devices, which are others in other tests."""

    def forget() -> None:
        hardware._of_gpu.cache_clear()
        hardware.lacking.clear()
        backend.said.clear()

    forget()
    yield
    forget()


@pytest.fixture
def gpus(monkeypatch):
    """Makes of architectures the GPUs of this machine, in their order; the first is the current one."""

    def make(*architectures: str) -> None:
        def properties(index: int) -> SimpleNamespace:
            arch = architectures[index]
            if arch.startswith("gfx"):
                return SimpleNamespace(major=9, minor=0, gcnArchName=arch)
            return SimpleNamespace(**dict(zip(("major", "minor"), divmod(int(arch[3:]), 10), strict=True)))

        monkeypatch.setattr(torch.version, "hip", "7.0" if architectures[0].startswith("gfx") else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(hardware, "interpreted", lambda: False)

    return make


def on(index: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=f"cuda:{index}")


def test_settings_are_those_of_the_tensors_own_device(gpus, monkeypatch):
    gpus("sm_90", "sm_86", "sm_103")
    tiles = []
    monkeypatch.setattr(run, "run", lambda *_, **given: tiles.append((given["QUERY_BLOCK"], given["num_warps"])))
    for index in range(3):
        q = on(index, 2, 198, 6, 64, dtype=torch.float32)
        with q.fake_mode:
            attention.attention([q, q, q], 0.125)
    expected = [attention.settings.attention(64, 4, arch) for arch in ("sm_90", "sm_86", "sm_100")]
    assert tiles == [(tile.queries, tile.num_warps) for tile in expected]
    assert len(set(tiles)) == 3


def test_an_amd_gpus_architecture_is_named_without_its_features(gpus):
    gpus("gfx90a:sramecc+:xnack-", "gfx942:sramecc+:xnack-", "gfx1201")
    assert [hardware.architecture(on(index, 1)) for index in range(3)] == ["gfx90a", "gfx942", "gfx1200"]
    assert hardware.no_products(on(2, 1, dtype=torch.float32)) == "gfx1201 has no matrix instructions for float32"
    assert hardware.no_products(on(2, 1)) is None and hardware.no_products(on(1, 1, dtype=torch.float32)) is None


@pytest.mark.parametrize("arch", [*hardware.KNOWN, *hardware.ALIKE])
def test_a_family_is_one_that_the_table_knows(arch):
    assert hardware.family(arch) in hardware.KNOWN


STOCK = ("sm_70", "sm_75", "sm_88", "sm_130", "gfx906", "gfx1030", "gfx1100", "gfx1250")


@pytest.mark.parametrize("arch", STOCK)
def test_every_operator_of_a_gpu_without_a_family_is_stocks_and_that_is_said_once(arch, gpus, monkeypatch):
    gpus("sm_90")
    monkeypatch.setattr(hardware, "native_architecture", lambda device: arch)
    monkeypatch.setattr(run, "run", lambda kernel, *args, **options: pytest.fail(f"{kernel} was launched"))
    with backend.forced("triton"), pytest.warns(UserWarning) as caught:
        for name, arguments in samples(requires_grad=True).items():
            found = public(name)(*arguments)
            found = [t for t in ([found] if isinstance(found, Tensor) else found) if t.requires_grad]
            torch.autograd.backward(found, [torch.ones_like(t) for t in found])
    assert [str(w.message) for w in caught] == [f"deit_fast: no kernels for {arch}; using the stock PyTorch operators"]
    assert str(SwapReport()).splitlines()[-1] == f"stock operators run: no kernels for {arch}"


def test_where_only_float32_has_no_matrix_instructions_other_kernels_run(gpus, monkeypatch):
    gpus("sm_90")
    monkeypatch.setattr(hardware, "native_architecture", lambda device: "gfx1201")
    launched = []
    monkeypatch.setattr(run, "run", lambda kernel, *args, **options: launched.append(kernel.__name__))
    with backend.forced("triton"), torch.no_grad(), pytest.warns(UserWarning) as caught:
        for arguments in samples().values():
            assert {t.dtype for t in tensors(arguments)} <= {torch.float32, torch.int64, torch.bool}
        for name, arguments in samples().items():
            public(name)(*arguments)
    assert not [name for name in launched if "linear" in name or "attention" in name or "mlp" in name]
    assert "layer_norm_kernel" in launched
    assert [str(w.message) for w in caught] == [
        "deit_fast: gfx1201 has no matrix instructions for float32; using the stock PyTorch operators"
    ]


def test_the_report_of_a_swap_says_what_the_models_gpu_lacks(gpus):
    timm = pytest.importorskip("timm")
    gpus("sm_90", "sm_75")
    for index, said in enumerate(([], ["no kernels for sm_75"])):
        model = timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        fake = torch.empty(parameter.shape, device=f"cuda:{index}")
                        module._parameters[name] = torch.nn.Parameter(fake)
            report = swap(model)
        assert report.lacking == said
        assert ("stock operators run: no kernels for sm_75" in str(report).splitlines()) == bool(said)


def test_a_command_makes_its_device_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert predict.find_device("cuda:1") == torch.device("cuda", 1)
    assert predict.find_device("cpu") == torch.device("cpu")
    assert chosen == [torch.device("cuda", 1)]


def test_a_linear_layer_compiles_to_matrix_instructions_on_every_gpu_that_has_a_family():
    for arch, found in printed_by("-m", "tests.kernels.launching.hardware_checks").items():
        assert found == {"launches": 2, "architecture": arch, "spilled": [0, 0], "matrix instructions": [True, True]}


def test_the_drivers_version_is_asked_of_the_driver(monkeypatch):
    """On a stand-in for libcuda, and where there is none."""

    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version) -> None:
            version._obj.value = 12080

    def missing(name: str):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.version, "hip", None)
    for library, version in ((Library, "12080"), (missing, "none")):
        monkeypatch.setattr(hardware.ctypes, "CDLL", library)
        assert hardware.driver_version.__wrapped__() == version
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert hardware.driver_version.__wrapped__() == "6.4"
