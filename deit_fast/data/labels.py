"""Names of classes, and the likeliest of them."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from deit_fast.models.checkpoint import load_checkpoint
from deit_fast.models.key_maps import to_timm_names


def describe_checkpoint(path: str) -> tuple[int, list[str] | None]:
    """The number of classes of a checkpoint's head, and their names where a transformers folder has them.

    Raises:
        ValueError: the checkpoint has no classifier head, or names other classes than it has.
    """
    checkpoint = load_checkpoint(path)
    head = to_timm_names(checkpoint.state_dict).get("head.weight")
    if head is None:
        raise ValueError(f"{path} has no classifier head, so there is nothing to predict")
    num_classes = head.tensor.shape[0]
    names = (checkpoint.config or {}).get("id2label")
    # transformers fills the names in with LABEL_0, LABEL_1, … where nobody gave any.
    if not names or "LABEL_0" in names.values() or len(names) != num_classes:
        return num_classes, None
    return num_classes, _by_index(names, f"id2label of {path}")


def read_labels(path: str) -> list[str]:
    """Class names by index, from a text file with one a line or a JSON list or dict (`{"0": "tench", …}`).

    Raises:
        ValueError: the file holds anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file of labels: {error}") from error
    if text.lstrip()[:1] not in ("[", "{"):
        labels = [line.strip() for line in text.strip().splitlines()]
    else:
        try:
            labels = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if isinstance(labels, dict):
            labels = _by_index(labels, path)
    if not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path} holds no labels; expected one name a class")
    return labels


def _by_index(names: dict[str, str], source: str) -> list[str]:
    if set(names) != {str(index) for index in range(len(names))}:
        raise ValueError(f"{source} does not map 0 to {len(names) - 1} to names")
    return [names[str(index)] for index in range(len(names))]


def default_labels(num_classes: int, trained: bool) -> list[str]:
    """ImageNet's names for 1000 trained classes where timm is installed to tell them, else the indices."""
    if trained and num_classes == 1000 and find_spec("timm"):
        from timm.data import ImageNetInfo

        return list(ImageNetInfo().label_descriptions())
    return [str(index) for index in range(num_classes)]


def top_classes(probabilities: Tensor, labels: list[str], k: int) -> list[dict[str, Any]]:
    """The k most likely classes of one image, most likely first. probabilities: [C], as many as labels."""
    top = probabilities.topk(k)
    return [
        {"index": index, "label": labels[index], "probability": probability}
        for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
