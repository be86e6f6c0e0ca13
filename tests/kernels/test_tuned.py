import json

import pytest
import torch
import triton

from deit_fast.kernels import launch, tuned
from deit_fast.kernels.tuned import Choice

NAMES = ("x", "norm_weight", "norm_bias", "eps", "weight", "bias", "kept", "capacity")
DEVICE, DRIVER = "NVIDIA_A100-SXM4-80GB", "12080"
SETTINGS = {"gemm(1152, 384, 2, sm_80, layer_norm)": launch.Tile(64, 64, 64, 4, 2)._asdict()}


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_FAST_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.forget()
    tuned._said.clear()
    yield tmp_path / "tuned"
    tuned.forget()


def arguments(batch: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    x = torch.empty(batch, 198, 384, dtype=dtype)
    return x, torch.empty(384), None, 1e-6, torch.empty(1152, 384, dtype=dtype), torch.empty(1152), None, batch


def write(batch: int, choice: Choice) -> None:
    shape, _ = tuned.described(NAMES, arguments(batch))
    tuned.write("layer_norm_linear", shape, DEVICE, DRIVER, batch, choice)


def chosen(batch: int, driver: str = DRIVER, device: str = DEVICE, dtype=torch.bfloat16) -> Choice | None:
    return tuned.choice("layer_norm_linear", NAMES, arguments(batch, dtype), device, driver)


def test_a_file_is_named_by_shape_and_device_and_its_keys_are_batches(user_folder):
    write(64, Choice(False, SETTINGS))
    write(256, Choice(True, {}))
    name = "layer_norm_linear,x=198x384bf16,norm_weight,weight=1152x384bf16,bias,device_name=NVIDIA_A100-SXM4-80GB.json"
    assert [file.name for file in user_folder.iterdir()] == [name]
    assert json.loads((user_folder / name).read_text()) == {
        "format": 1,
        "triton": triton.__version__,
        "driver": DRIVER,
        "64": {"runs": "triton", "settings": SETTINGS},
        "256": {"runs": "stock"},
    }


@pytest.mark.parametrize("batch", [1, 64, 127])
def test_the_nearest_batch_answers(batch):
    write(64, Choice(False, SETTINGS))
    write(256, Choice(True, {}))
    assert chosen(batch) == Choice(False, SETTINGS)
    assert chosen(256) == chosen(129) == chosen(4096) == Choice(True, {})


def test_another_shape_dtype_or_device_has_not_been_measured():
    write(64, Choice(True, {}))
    assert chosen(64, dtype=torch.float16) is None
    assert chosen(64, device="NVIDIA_L4") is None
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


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 1, "triton": "T", "driver": "12080", "0": {"runs": "stock"}}'.replace("T", "{}"),
     '{"format": 1, "triton": "{}", "driver": "12080", "64": {"runs": "fast"}}'],
)  # fmt: skip
def test_a_broken_file_is_left_alone_and_said_once(content, user_folder):
    write(64, Choice(True, {}))
    (file,) = user_folder.iterdir()
    file.write_text(content.replace('"{}"', f'"{triton.__version__}"'))
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
    shape, _ = tuned.described(NAMES, arguments(8))
    tuned.write("layer_norm_linear", shape, DEVICE, "13000", 8, Choice(False, {}))
    assert chosen(64, driver="13000") == Choice(False, {})


def test_every_argument_but_the_batch_is_in_the_name():
    names = ("grads", "weights", "needs", "activation", "qkv", "scale", "kept")
    given = (
        [torch.empty(4, 6, 8), torch.empty(4, 6, 8)],
        [torch.empty(8, 2)],
        [True, False],
        "gelu",
        torch.empty(4, 6, 3, 1, 16, dtype=torch.float16),
        0.25,
        torch.empty(5, dtype=torch.int32),
    )
    found = "grads=6x8fp32,weights=8x2fp32,needs=10,activation=gelu,qkv=6x3x1x16fp16,kept"
    assert tuned.described(names, given) == (found, 4)
