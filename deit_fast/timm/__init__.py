"""Swapped twins of timm's DeiT and DeiT III models in timm's own registry, by the name of each after `deit_fast_`.

    import deit_fast.timm
    model = timm.create_model("deit_fast_deit_small_distilled_patch16_224", pretrained=True)

A twin takes the arguments of the model beside it, has its pretrained configurations, and is `deit_fast.swap` of it.
So a script that builds its model by name runs on the fused operators with this import and another name.

Importing this raises ImportError if timm is not installed, or a release that `deit_fast.swap` does not know.
"""

from collections.abc import Callable
from typing import Any

from torch.nn import Module

from deit_fast._extras import require

require("timm", extra="timm")

import timm  # noqa: E402
from timm.models import generate_default_cfgs, register_model  # noqa: E402

from deit_fast.swap import swap  # noqa: E402
from deit_fast.swap import timm as _rules  # noqa: E402, F401  (raises for a release that is too old)

PREFIX = "deit_fast_"
__all__: list[str] = []
# timm reads its registered models' configurations in a variable of this name.
default_cfgs: dict[str, Any] = {}


def _twin(name: str) -> Callable[..., Module]:
    stock = timm.models.model_entrypoint(name)

    def build(pretrained: bool = False, **kwargs: Any) -> Module:
        model = stock(pretrained=pretrained, **kwargs)
        swap(model)
        return model

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"timm's `{name}`, swapped."
    return build


for _name in timm.list_models(["deit_*", "deit3_*"], module="deit"):
    # Not timm's own table: a weight's address there is made of the name it is registered by.
    _tags = timm.models.deit.default_cfgs[_name].tags
    _tagged: Any = {f"{PREFIX}{_name}.{tag}": timm.get_pretrained_cfg(f"{_name}.{tag}") for tag in _tags}
    default_cfgs.update(generate_default_cfgs(_tagged))
    globals()[PREFIX + _name] = register_model(_twin(_name))
