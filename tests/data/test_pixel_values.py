"""What a processor returns, against transformers' BatchFeature."""

import copy
import pickle

import numpy as np
import pytest
import torch

from deit_fast.data import PixelValues


def contents():
    return {
        "pixel_values": torch.rand(2, 3),
        "raw": torch.tensor([[1, 200]], dtype=torch.uint8),
        "labels": torch.tensor([1, 70_000]),
        "mask": torch.tensor([True]),
        "pieces": [torch.rand(2), torch.tensor([3]), [torch.rand(1)]],
        "pair": (torch.rand(2).double(), "name"),
        "array": np.ones(2),
        "names": ["a", "b"],
    }


def dtypes(value):
    if isinstance(value, list | tuple):
        return type(value), [dtypes(each) for each in value]
    return (value.dtype, str(getattr(value, "device", ""))) if hasattr(value, "dtype") else value


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.float16,), {}),
        ((), {"dtype": torch.bfloat16}),
        (("meta",), {}),
        (("meta", torch.float16), {}),
        ((torch.device("meta"),), {"dtype": torch.float16}),
        ((), {"device": "meta", "dtype": torch.float16, "non_blocking": True}),
    ],
    ids=str,
)
def test_only_floating_point_is_cast_and_in_place_as_in_transformers(args, kwargs):
    transformers = pytest.importorskip("transformers")
    ours, theirs = PixelValues(contents()), transformers.BatchFeature(contents())
    assert ours.to(*args, **kwargs) is ours and theirs.to(*args, **kwargs) is theirs
    assert {key: dtypes(value) for key, value in ours.items()} == {key: dtypes(value) for key, value in theirs.items()}


def test_what_is_neither_device_nor_dtype_is_refused_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    for kind in (PixelValues, transformers.BatchFeature):
        with pytest.raises(ValueError, match=r"(?i)tensor"):
            kind(contents()).to(torch.zeros(1))


def test_keys_are_attributes_and_copies_keep_them():
    batch = PixelValues(contents())
    assert batch.labels is batch["labels"] is batch.data["labels"]
    with pytest.raises(AttributeError, match="absent"):
        batch.absent  # noqa: B018
    for each in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert isinstance(each, PixelValues) and torch.equal(each.labels, batch.labels)
