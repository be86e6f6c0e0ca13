"""How often a kernel's tiling makes it load each element of a tensor, worked out from the launch's arguments."""

from collections.abc import Callable
from types import SimpleNamespace

from triton import cdiv

from evidence.access_counter import CountedLaunch

# Times an element is loaded, and the words for it.
Explanation = tuple[float, str]
ONCE: Explanation = (1, "once")


def explanations(launch: CountedLaunch) -> dict[str, Explanation] | None:
    """By tensor, or None for a kernel that is not known here."""
    if launch.kernel not in _KERNELS:
        return None
    names = [access.name for access in launch.accesses]
    shapes = {access.name: access.shape for access in launch.accesses}
    exceptions = _KERNELS[launch.kernel](SimpleNamespace(**launch.arguments, tensors=names, shapes=shapes))
    return {name: exceptions.get(name, ONCE) for name in names}


def _linear(a) -> dict[str, Explanation]:
    rows, columns = cdiv(a.rows, a.ROW_BLOCK), cdiv(a.out_features, a.COLUMN_BLOCK)
    if "k_weight" in a.tensors:
        columns *= 3
    weights = ("weight", "k_weight", "v_weight", "bias", "k_bias", "v_bias")
    return {"x": (columns, "column tiles")} | dict.fromkeys(weights, (rows, "row tiles"))


def _layer_norm(a) -> dict[str, Explanation]:
    return dict.fromkeys(("weight", "bias"), (cdiv(a.rows, a.ROWS), "row blocks"))


def _attention(a) -> dict[str, Explanation]:
    return dict.fromkeys(("k", "v"), (cdiv(a.queries, a.QUERY_BLOCK), "query blocks"))


def _mlp(a) -> dict[str, Explanation]:
    weights = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return {"x": (2, "as input and as residual")} | dict.fromkeys(weights, (cdiv(a.rows, a.ROW_BLOCK), "row tiles"))


def _key_gradient(a) -> dict[str, Explanation]:
    return dict.fromkeys(("q", "grad", "log_sum_exp", "delta"), (cdiv(a.keys, a.KEY_BLOCK), "key blocks"))


def _input_gradient(a) -> dict[str, Explanation]:
    columns = (cdiv(a.in_features, a.COLUMN_BLOCK), "column tiles")
    rows = (cdiv(a.rows, a.ROW_BLOCK), "row tiles")
    return dict.fromkeys(("grad", "k_grad", "v_grad"), columns) | dict.fromkeys(
        ("weight", "k_weight", "v_weight"), rows
    )


def _scaled_weight(a) -> dict[str, Explanation]:
    programs = cdiv(a.out_features, a.ROW_BLOCK) * cdiv(a.in_features, a.COLUMN_BLOCK)
    columns = cdiv(a.in_features, a.COLUMN_BLOCK)
    return {"layer_scale": (programs + columns, "programs for the largest, and the weight's column tiles")}


def _weight_gradient(a) -> dict[str, Explanation]:
    columns, rows = cdiv(a.in_features, a.IN_BLOCK), a.PROJECTIONS * cdiv(a.out_features, a.OUT_BLOCK)
    of_grad = (columns, "the weight's column tiles")
    if "sum" in a.tensors:
        of_grad = (columns + 1, "the weight's column tiles, and once for the sum")
    return dict.fromkeys(("grad", "k_grad", "v_grad"), of_grad) | {"x": (rows, "the weight's row tiles")}


def _finish_layer_norm_linear(a) -> dict[str, Explanation]:
    norm = dict.fromkeys(("norm_weight", "norm_bias"), (a.PROJECTIONS, "projections"))
    return norm | {"sum": (cdiv(a.in_features, a.IN_BLOCK), "the weight's column tiles")}


def _layer_norm_backward(a) -> dict[str, Explanation]:
    return {"weight": (cdiv(a.rows, a.ROWS), "row blocks")}


_KERNELS: dict[str, Callable[[SimpleNamespace], dict[str, Explanation]]] = {
    "linear_kernel": _linear,
    "layer_norm_kernel": _layer_norm,
    "attention_kernel": _attention,
    "mlp_kernel": _mlp,
    "query_gradient_kernel": _attention,
    "key_gradient_kernel": _key_gradient,
    "branch_gradient_kernel": lambda a: {},
    "scaled_weight_kernel": _scaled_weight,
    "input_gradient_kernel": _input_gradient,
    "weight_gradient_kernel": _weight_gradient,
    "finish_linear_kernel": lambda a: {},
    "finish_layer_norm_linear_kernel": _finish_layer_norm_linear,
    "layer_norm_backward_kernel": _layer_norm_backward,
}
