"""What a launch tells profilers: Triton's Proton shows achieved rates from it."""

from collections.abc import Callable

from torch import Tensor


def described(flops: Callable[[dict], int] | None = None) -> Callable[..., dict]:
    """A kernel's `launch_metadata`: its name with its first tensor's shape and dtype, FLOPs and bytes.

    flops: of the launch, from its arguments by name; matrix products, two a multiply-add. bytes: every tensor of the
    launch once. Samples that drop path drops count too: how many they are only the device knows.
    """

    def launch_metadata(grid: tuple, compiled, arguments: dict) -> dict:
        tensors = {id(value): value for value in arguments.values() if isinstance(value, Tensor)}.values()
        first = next(iter(tensors), None)
        shape = "" if first is None else f" {'×'.join(map(str, first.shape))} {str(first.dtype).removeprefix('torch.')}"
        found = {"name": f"{compiled.name}{shape}", "bytes": sum(t.numel() * t.element_size() for t in tensors)}
        if flops is not None:
            # Products run in the narrowest dtype: under autocast the stream beside them is float32.
            width = min(t.element_size() for t in tensors if t.is_floating_point())
            found[f"flops{8 * width}"] = flops(arguments)
        return found

    return launch_metadata


def linear_flops(arguments: dict) -> int:
    """Of a product of [rows, in_features] and [in_features, out_features], or of three with the weights of k and v."""
    products = sum(arguments[name] is not None for name in ("weight_ptr", "k_weight_ptr", "v_weight_ptr"))
    return 2 * products * arguments["rows"] * arguments["in_features"] * arguments["out_features"]
