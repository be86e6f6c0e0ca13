"""The hooks by which transformers records hidden states and attentions."""

from torch.nn import Module
from transformers.utils import output_capturing

from deit_fast.nn import parts


def touched(module: Module, recorded: str) -> str | None:
    """As `parts.touched`, but for the hook that one request to record outputs leaves behind for good.

    That hook records while a model that was asked to runs, and is idle at all other times. recorded: "attentions" or
    "hidden_states".
    """
    if not module._forward_hooks:
        return parts.touched(module)
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has a hook"
    if "forward" in module.__dict__:
        return "has a forward of its own on the instance"
    if not all(_captures_outputs(hook) for hook in module._forward_hooks.values()):
        return "has a hook"
    if recorded in (output_capturing._active_collector.get() or ()):
        return f"is asked for its {recorded.replace('_', ' ')}"
    return None


def _captures_outputs(hook: object) -> bool:
    return (
        getattr(hook, "__module__", None) == output_capturing.__name__
        and getattr(hook, "__name__", None) == "output_capturing_hook"
    )
