"""What `deit-fast check` computes: every operator at a model's shapes, its inputs random but the same each time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deit_fast import ops

EPS = 1e-6
PREFIX = 2  # CLS and distillation token
DROPPED = 4  # drop path drops every fourth sample


@dataclass(frozen=True)
class Size:
    """Of a model and of its batch."""

    width: int
    heads: int
    image: int
    patch: int
    classes: int
    batch: int

    @property
    def tokens(self) -> int:
        return PREFIX + (self.image // self.patch) ** 2

    @property
    def scale(self) -> float:
        return (self.width // self.heads) ** -0.5


# Narrow rows in batches that fill any GPU, where some operators take other kernels than for a few images.
DEIT_SIZES = tuple(Size(width, width // 64, 224, 16, 1000, batch) for width, batch in ((192, 128), (384, 64), (768, 8)))
INTERPRETER_SIZES = (Size(64, 2, 32, 8, 10, batch=4),)


@dataclass(frozen=True)
class Case:
    """`function` of the named `arguments`; all floating ones have gradients, unless it is for inference only."""

    op: str
    title: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    arguments: dict[str, Any]
    inference: bool = False

    @property
    def differentiable(self) -> list[str]:
        """The arguments that get gradients. The teacher's logits and drop path's scale are data."""
        if self.inference:
            return []
        return [
            name
            for name, value in self.arguments.items()
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and name not in ("teacher_logits", "drop_path_scale", "mean", "std")
        ]


class Inputs:
    """Random tensors of one size, dtype and device, from a seed."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator)
        return (mean + scale * values).to(self.device, self.dtype)

    def integers(self, *shape: int, below: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(below, shape, generator=self._generator).to(self.device, dtype)

    def tokens(self) -> Tensor:
        return self.normal(self.size.batch, self.size.tokens, self.size.width)

    def norm(self, prefix: str = "norm_") -> dict[str, Any]:
        width = self.size.width
        return {
            f"{prefix}weight": self.normal(width, scale=0.1, mean=1.0),
            f"{prefix}bias": self.normal(width, scale=0.1),
            "eps": EPS,
        }

    def linear(self, outputs: int, inputs: int, prefix: str = "") -> dict[str, Tensor]:
        return {
            f"{prefix}weight": self.normal(outputs, inputs, scale=inputs**-0.5),
            f"{prefix}bias": self.normal(outputs, scale=0.1),
        }

    def qkv(self) -> dict[str, Tensor]:
        """Three projections kept as separate parameters."""
        width = self.size.width
        return {name: p for part in "qkv" for name, p in self.linear(width, width, f"{part}_").items()}

    def branch_scales(self) -> dict[str, Tensor]:
        """LayerScale, and drop path's factors: 0 for the dropped samples."""
        batch = self.size.batch
        factors = torch.full((batch,), DROPPED / (DROPPED - 1))
        factors[::DROPPED] = 0.0
        return {
            "layer_scale": self.normal(self.size.width, scale=0.1, mean=1.0),
            "drop_path_scale": factors.to(self.device, self.dtype),
        }


def _layer_norm(size: Size, new: Inputs) -> Iterator[Case]:
    yield Case("layer_norm", "", ops.layer_norm, {"x": new.tokens(), **new.norm("")})


def _add_layer_norm(size: Size, new: Inputs) -> Iterator[Case]:
    arguments = {"x": new.tokens(), "residual": new.tokens(), **new.norm("")}
    yield Case("add_layer_norm", "", ops.add_layer_norm, arguments)


def _linear(size: Size, new: Inputs) -> Iterator[Case]:
    arguments = {"x": new.tokens(), **new.linear(4 * size.width, size.width)}
    yield Case("linear", "", ops.linear, arguments)
    yield Case("linear", "with GELU", ops.linear, {**arguments, "activation": "gelu"}, inference=True)


def _layer_norm_linear(size: Size, new: Inputs) -> Iterator[Case]:
    for title, outputs in (("QKV", 3 * size.width), ("FC1", 4 * size.width)):
        arguments = {"x": new.tokens(), **new.norm(), **new.linear(outputs, size.width)}
        yield Case("layer_norm_linear", title, ops.layer_norm_linear, arguments)


def _layer_norm_qkv(size: Size, new: Inputs) -> Iterator[Case]:
    arguments = {"x": new.tokens(), **new.norm(), **new.qkv()}
    yield Case("layer_norm_qkv", "", ops.layer_norm_qkv, arguments)
    yield Case("layer_norm_qkv", "and the residual", _layer_norm_qkv_branching, arguments)


def _layer_norm_qkv_branching(**arguments: Any) -> tuple[Tensor, ...]:
    return ops.layer_norm_qkv_branching(*arguments.values())


def _linear_residual(size: Size, new: Inputs) -> Iterator[Case]:
    for title, inputs, activation in (("projection", size.width, "none"), ("FC2", 4 * size.width, "gelu")):
        arguments = {
            "x": new.normal(size.batch, size.tokens, inputs),
            **new.linear(size.width, inputs),
            "residual": new.tokens(),
            **new.branch_scales(),
            "input_activation": activation,
        }
        yield Case("linear_residual", title, ops.linear_residual, arguments)


def _mlp_arguments(size: Size, new: Inputs) -> dict[str, Any]:
    return {
        "x": new.tokens(),
        **new.norm(),
        **new.linear(4 * size.width, size.width, "fc1_"),
        **new.linear(size.width, 4 * size.width, "fc2_"),
        **new.branch_scales(),
    }


def _mlp(size: Size, new: Inputs) -> Iterator[Case]:
    yield Case("mlp", "", ops.mlp, _mlp_arguments(size, new))


def _attention(size: Size, new: Inputs) -> Iterator[Case]:
    qkv = new.normal(size.batch, size.tokens, 3, size.heads, size.width // size.heads)
    yield Case("attention", "", ops.attention, {"qkv": qkv, "scale": size.scale})


def _attention_qkv(size: Size, new: Inputs) -> Iterator[Case]:
    shape = (size.batch, size.tokens, size.heads, size.width // size.heads)
    arguments = {**{name: new.normal(*shape) for name in "qkv"}, "scale": size.scale}
    yield Case("attention_qkv", "", ops.attention_qkv, arguments)


def _patch_embed(size: Size, new: Inputs) -> Iterator[Case]:
    shape = (size.batch, 3, size.image, size.image)
    rest = {
        "weight": new.normal(size.width, 3, size.patch, size.patch, scale=(3 * size.patch**2) ** -0.5),
        "bias": new.normal(size.width, scale=0.1),
        "pos_embed": new.normal(1, size.tokens, size.width),
        "cls_token": new.normal(1, 1, size.width),
        "dist_token": new.normal(1, 1, size.width),
    }
    yield Case("patch_embed", "", ops.patch_embed, {"images": new.normal(*shape), **rest})
    pixels = {
        "images": new.integers(*shape, below=256, dtype=torch.uint8),
        "mean": torch.full((3,), 0.5, device=new.device),
        "std": torch.full((3,), 0.25, device=new.device),
    }
    yield Case("patch_embed", "of uint8 pixels", ops.patch_embed, {**pixels, **rest})


def _readout_attention(size: Size, new: Inputs) -> Iterator[Case]:
    arguments = {"x": new.tokens(), **new.norm(), **new.linear(3 * size.width, size.width)}
    options = {"readout_rows": PREFIX, "num_heads": size.heads, "scale": size.scale}
    yield Case("readout_attention", "", ops.readout_attention, {**arguments, **options})


def _readout_attention_qkv(size: Size, new: Inputs) -> Iterator[Case]:
    arguments = {"x": new.tokens(), **new.norm(), **new.qkv()}
    options = {"readout_rows": PREFIX, "num_heads": size.heads, "scale": size.scale}
    yield Case("readout_attention_qkv", "", ops.readout_attention_qkv, {**arguments, **options})


def _keep_samples(size: Size, new: Inputs) -> Iterator[Case]:
    def block(x, norm_weight, norm_bias, eps, drop_path_scale, layer_scale, **parameters):
        """A block's two halves for the kept samples; what lies between is packed."""
        norm = (norm_weight, norm_bias, eps)
        kept = ops.keep_samples(drop_path_scale)
        qkv, x = ops.layer_norm_linear_branching(x, *norm, parameters["qkv_weight"], parameters["qkv_bias"], kept)
        qkv = qkv.unflatten(-1, (3, size.heads, -1))
        out, _ = ops.attention(qkv, size.scale, kept)
        projection = parameters["proj_weight"], parameters["proj_bias"]
        x = ops.linear_residual(out, *projection, x, layer_scale, drop_path_scale, kept=kept)
        fc = (parameters[f"fc{i}_{kind}"] for i in (1, 2) for kind in ("weight", "bias"))
        return kept, ops.mlp(x, *norm, *fc, layer_scale, drop_path_scale, kept=kept)

    arguments = {
        **_mlp_arguments(size, new),
        **new.linear(3 * size.width, size.width, "qkv_"),
        **new.linear(size.width, size.width, "proj_"),
    }
    yield Case("keep_samples", "and a block of the kept ones", block, arguments)


def _distillation_loss(size: Size, new: Inputs) -> Iterator[Case]:
    logits = {name: new.normal(size.batch, size.classes) for name in ("logits", "dist_logits", "teacher_logits")}
    labels = new.integers(size.batch, below=size.classes, dtype=torch.int64)
    for kind, tau in (("hard", 1.0), ("soft", 3.0)):
        options = {"distillation_type": kind, "alpha": 0.5, "tau": tau, "label_smoothing": 0.1}
        yield Case("distillation_loss", kind, ops.distillation_loss, {**logits, "targets": labels, **options})


_BUILDERS: dict[str, Callable[[Size, Inputs], Iterator[Case]]] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "linear": _linear,
    "layer_norm_linear": _layer_norm_linear,
    "layer_norm_qkv": _layer_norm_qkv,
    "linear_residual": _linear_residual,
    "mlp": _mlp,
    "attention": _attention,
    "attention_qkv": _attention_qkv,
    "patch_embed": _patch_embed,
    "readout_attention": _readout_attention,
    "readout_attention_qkv": _readout_attention_qkv,
    "keep_samples": _keep_samples,
    "distillation_loss": _distillation_loss,
}
OPS = tuple(_BUILDERS)


def of_size(op: str, size: Size) -> str:
    """What of the size the cases of `op` depend on."""
    dims = f"{size.classes} classes" if op == "distillation_loss" else f"{size.tokens} tokens, width {size.width}"
    return f"batch {size.batch}, {dims}"


def cases(op: str, size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The cases of one operator, titled with what of the size they depend on."""
    for case in _BUILDERS[op](size, Inputs(size, dtype, device)):
        yield replace(case, title=", ".join(filter(None, (case.title, of_size(op, size)))))
