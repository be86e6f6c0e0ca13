"""The models that are measured: DeiT-Ti/S/B distilled at 224 pixels, N = 198 tokens, random weights."""

import torch
from torch import nn

# Width and heads by size.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
DEPTH = 12
TOKENS = 198
IMAGE_SIZE = 224
LIBRARIES = ("timm", "transformers", "deit_fast")


def build(library: str, size: str, depth: int = DEPTH) -> nn.Module:
    """The model of that library in evaluation mode, cut to `depth` blocks. Images in, logits out."""
    name = f"deit_{size}_distilled_patch16_{IMAGE_SIZE}"
    if library == "transformers":
        return _transformers(size, depth)
    if library == "timm":
        import timm

        model = timm.create_model(name)
    elif library == "deit_fast":
        import deit_fast

        model = deit_fast.create_model(name)
    else:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}; got {library!r}")
    model.blocks = model.blocks[:depth]
    return model.eval()


def _transformers(size: str, depth: int) -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    width, heads = SIZES[size]
    config = DeiTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_labels=1000,
    )
    return DeiTForImageClassificationWithTeacher(config).eval()


def images(batch: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(batch, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=dtype)


def choices(text: str, known: dict | tuple, what: str) -> list[str]:
    """A comma-separated command-line argument as a list of known names."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"unknown {what} {', '.join(unknown) or '(none given)'}; known: {', '.join(known)}")
    return names
