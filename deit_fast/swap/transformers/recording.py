"""The hooks by which transformers records hidden states and attentions."""

from torch.nn import Module
from transformers.utils import output_capturing

from deit_fast.nn import parts


def touched(module: Module, classes: parts.Classes, recorded: str) -> str | None:
    """As `parts.unfusable`, but for the hook that one request to record outputs leaves behind for good.

    That hook records while a model that was asked to runs, and is idle at all other times. recorded: "attentions" or
    "hidden_states".
    """
    hooks = module._forward_hooks
    if not hooks or not all(map(_captures_outputs, hooks.values())):
        return parts.unfusable(module, classes)
    if recorded in (output_capturing._active_collector.get() or ()):
        return f"is asked for its {recorded.replace('_', ' ')}"
    return parts.unfusable(module, classes, hooked=True)


def _captures_outputs(hook: object) -> bool:
    return (
        getattr(hook, "__module__", None) == output_capturing.__name__
        and getattr(hook, "__name__", None) == "output_capturing_hook"
    )
