import itertools
import json
import os
import re

import pytest
import torch
import triton

from deit_fast.kernels.launching import tuned
from deit_fast.kernels.launching.settings import Tile
from deit_fast.kernels.launching.tuned import Argument, Choice
from deit_fast.ops.operator import OPERATORS

DECLARED = OPERATORS["layer_norm_linear"].arguments
DEVICE, DRIVER = "NVIDIA A100-SXM4-80GB", "12080"
# As GPUs are called, and as none is: too long, not for a file system, alike in all that a file's name shows.
DEVICES = (
    DEVICE, "NVIDIA H200", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H100 80GB HBM3 MIG 1g.20gb", "AMD Instinct MI300X OAM", "AMD Radeon(TM) Graphics", "",
    "../GPU", "GPU:0", "GPU/0", "GPU 0", "Ж" * 300, "GPU " * 300, "GPU " * 301,
)  # fmt: skip
SETTINGS = {"gemm(16384, 1152, 384, 2, sm_80, none)": Tile(64, 64, 64, 4, 2)._asdict()}


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_FAST_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.forget()
    tuned._said.clear()
    yield tmp_path / "tuned"
    tuned.forget()


def arguments(batch: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    x, weight = torch.empty(batch, 198, 384, dtype=dtype), torch.empty(1152, 384, dtype=dtype)
    return x, torch.empty(384), None, 1e-6, [weight], [torch.empty(1152)], None, batch, "none"


def write(batch: int, choice: Choice) -> None:
    shape, _ = tuned.described(DECLARED, arguments(batch))
    tuned.write("layer_norm_linear", shape, DEVICE, DRIVER, batch, choice)


def chosen(batch: int, driver: str = DRIVER, device: str = DEVICE, dtype=torch.bfloat16) -> Choice | None:
    return tuned.choice("layer_norm_linear", DECLARED, arguments(batch, dtype), device, driver)


def widest(op: str) -> tuple:
    """Arguments of every kind the operator takes, q, k and v apart: as long a description as there can be."""
    tensor = torch.empty(64, 198, 3072, dtype=torch.bfloat16, device="meta")
    values = {
        "Tensor": tensor, "Optional[Tensor]": tensor, "List[Tensor]": [tensor] * 3,
        "List[Optional[Tensor]]": [tensor] * 3, "List[bool]": [True] * 8, "str": "gelu_tanh", "int": 1024,
        "Optional[int]": 1024, "float": 0.125,
    }  # fmt: skip
    schema = getattr(torch.ops.deit_fast, op).default._schema
    return tuple(values[str(argument.type)] for argument in schema.arguments)


def test_a_file_says_what_it_is_of_and_its_other_keys_are_batches(user_folder):
    write(64, Choice(False, SETTINGS))
    write(256, Choice(True, {}))
    (file,) = user_folder.iterdir()
    assert re.fullmatch(r"layer_norm_linear,NVIDIA_A100-SXM4-80GB,[0-9a-f]{16}\.json", file.name)
    assert json.loads(file.read_text()) == {
        "format": 4,
        "operator": "layer_norm_linear",
        "shape": "x=198x384bf16,norm_weight,weights=1152x384bf16,biases,activation=none",
        "device": "NVIDIA A100-SXM4-80GB",
        "triton": triton.__version__,
        "driver": DRIVER,
        "64": {"runs": "triton", "settings": SETTINGS},
        "256": {"runs": "stock"},
    }


@pytest.mark.parametrize("op", sorted(OPERATORS))
def test_every_operator_is_written_and_read_whatever_its_device_is_called(op, user_folder, monkeypatch):
    """Under names that every file system takes, the temporary ones included."""
    shape, _ = tuned.described(OPERATORS[op].arguments, widest(op))
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda part, file: (replaced.append(part.name), replace(part, file)))
    for batch, device in enumerate(DEVICES, 1):
        tuned.write(op, shape, device, DRIVER, batch, Choice(True, {}))
    for batch, device in enumerate(DEVICES, 1):
        assert tuned.measured(op, shape, device, DRIVER) == {batch: Choice(True, {})}
    names = [file.name for file in user_folder.iterdir()]
    assert len(names) == len(DEVICES)
    for name in names + replaced:
        assert len(name.encode()) <= 120 and re.fullmatch(r"[A-Za-z0-9_,.-]+", name), name
        assert name.startswith(f"{op},")


def test_a_name_is_of_one_operator_shape_and_device():
    about = itertools.product(sorted(OPERATORS), ("x=198x384bf16", "x=198x384fp16", "x=198x384bf16,bias"), DEVICES)
    names = [tuned.file_name(*each).lower() for each in about]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("field", "value"), [("operator", "mlp"), ("shape", "x=198x384bf16"), ("device", "NVIDIA A100-SXM4-40GB")]
)
def test_a_file_of_something_else_is_left_alone_and_said_once(field, value, user_folder):
    write(64, Choice(True, {}))
    (file,) = user_folder.iterdir()
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, field: value}))
    tuned.forget()
    with pytest.warns(UserWarning, match=f"is not of what its name says .{field} {value}, here .*; left alone"):
        assert chosen(64) is None
    assert chosen(32) is None
    write(8, Choice(False, {}))
    assert json.loads(file.read_text())[field] == content[field]
    assert chosen(64) == Choice(False, {})


@pytest.mark.parametrize("batch", [1, 64, 127])
def test_the_nearest_batch_answers(batch):
    write(64, Choice(False, SETTINGS))
    write(256, Choice(True, {}))
    assert chosen(batch) == Choice(False, SETTINGS)
    assert chosen(256) == chosen(129) == chosen(4096) == Choice(True, {})


def test_another_shape_dtype_or_device_has_not_been_measured():
    write(64, Choice(True, {}))
    assert chosen(64, dtype=torch.float16) is None
    assert chosen(64, device="NVIDIA L4") is None
    assert chosen(0) is None


def test_nothing_answers_while_it_is_off():
    write(64, Choice(True, {}))
    with tuned.enabled(False):
        assert chosen(64) is None
    assert chosen(64) is not None


def test_what_another_driver_measured_is_left_alone_and_said_once():
    write(64, Choice(True, {}))
    with pytest.warns(
        UserWarning, match=r"of another time \(driver 12080, here 13000\); left alone, run deit-fast tune"
    ):
        assert chosen(64, driver="13000") is None
    assert chosen(32, driver="13000") is None


def without(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    "broken",
    [
        lambda content: "",
        lambda content: "[]",
        lambda content: "{}",
        lambda content: json.dumps(without(content, "device")),
        lambda content: json.dumps({**content, "0": {"runs": "stock"}}),
        lambda content: json.dumps({**content, "64": {"runs": "fast"}}),
    ],
)
def test_a_broken_file_is_left_alone_and_said_once(broken, user_folder):
    write(64, Choice(True, {}))
    (file,) = user_folder.iterdir()
    file.write_text(broken(json.loads(file.read_text())))
    tuned.forget()
    with pytest.warns(UserWarning, match="can't be read"):
        assert chosen(64) is None
    assert chosen(64) is None


def test_what_the_package_ships_answers_for_every_driver_where_the_user_has_measured_nothing(user_folder):
    write(64, Choice(True, {}))
    user_folder.rename(tuned.SHIPPED)
    tuned.forget()
    assert chosen(64, driver="13000") == Choice(True, {})


def test_writing_takes_the_place_of_what_another_driver_measured(user_folder):
    write(64, Choice(True, {}))
    shape, _ = tuned.described(DECLARED, arguments(8))
    tuned.write("layer_norm_linear", shape, DEVICE, "13000", 8, Choice(False, {}))
    assert chosen(64, driver="13000") == Choice(False, {})


def test_every_argument_but_the_batch_is_in_the_description():
    declared = [
        Argument("grads", tensor=True, tensors=True, per_sample=True, keyed=True),
        Argument("weights", tensor=True, tensors=True, per_sample=False, keyed=True),
        Argument("needs", tensor=False, tensors=False, per_sample=False, keyed=True),
        Argument("activation", tensor=False, tensors=False, per_sample=False, keyed=True),
        Argument("qkv", tensor=True, tensors=False, per_sample=True, keyed=True),
        Argument("scale", tensor=False, tensors=False, per_sample=False, keyed=False),
        Argument("kept", tensor=True, tensors=False, per_sample=False, keyed=True),
    ]
    given = (
        [torch.empty(4, 6, 8), torch.empty(4, 6, 8)],
        [torch.empty(8, 2)],
        [True, False],
        "gelu",
        torch.empty(4, 6, 3, 1, 16, dtype=torch.float16),
        0.25,
        torch.empty(5, dtype=torch.int32),
    )
    found = "grads=2*6x8fp32,weights=8x2fp32,needs=10,activation=gelu,qkv=6x3x1x16fp16,kept"
    assert tuned.described(declared, given) == (found, 4)


def test_one_projection_and_three_are_described_apart():
    x, norm_weight, norm_bias, eps, weights, biases, *rest = arguments(8)
    three = (x, norm_weight, norm_bias, eps, weights * 3, biases * 3, *rest)
    assert tuned.described(DECLARED, three)[0] != tuned.described(DECLARED, arguments(8))[0]
