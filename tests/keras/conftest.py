"""Small models, and what transformers 4's TensorFlow classes gave; `make_reference.py` wrote it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# For whatever in this process imports keras first.
os.environ.setdefault("KERAS_BACKEND", "torch")

DATA = Path(__file__).parent / "data"
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 5,
}


@pytest.fixture
def reference() -> Callable[[str], tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Of a class: its folder, the arguments of a call, and the outputs by their names."""

    def read(name: str) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
        arrays = dict(np.load(DATA / name / "outputs.npz"))
        given = {key.removeprefix("given_"): value for key, value in arrays.items() if key.startswith("given_")}
        return DATA / name, given, {key: value for key, value in arrays.items() if not key.startswith("given_")}

    return read


@pytest.fixture
def config() -> Callable[..., Any]:
    from transformers import DeiTConfig

    return lambda **changes: DeiTConfig(**{**SMALL, **changes})


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Images [20, 3, 16, 16] and labels."""
    return torch.randn(20, 3, 16, 16).numpy(), torch.randint(0, 5, (20,)).numpy()
