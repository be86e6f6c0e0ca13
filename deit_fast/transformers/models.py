"""Subclasses of transformers' DeiT and ViT classes whose modules are swapped when they are built.

Loading, saving, outputs and training are transformers' own.
"""

from collections.abc import Mapping
from typing import Any

from torch.nn import Module
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

import deit_fast.transformers
from deit_fast.swap import swap
from deit_fast.swap.copies import Swapped
from deit_fast.swap.rules import RULES


class BornSwapped(Swapped):
    """In front of a class of transformers'. Takes its arguments, and swaps what it has built.

    Copies and pickles are of this class. `deit_fast.restore` and `deit_fast.swap` work as on any model.
    The subclasses bear the module of transformers' class, as swapped ones do: PEFT writes it into an adapter's folder,
    and transformers translates the names in older checkpoints for its own classes alone.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        swap(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        swap(self)  # the modules within were pickled as stock

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made_by, arguments, *rest = super().__reduce_ex__(protocol)
        name = type(self).__name__
        if getattr(deit_fast.transformers, name, None) is type(self):  # not where its module says
            made_by, arguments = _unborn, (name,)
        return made_by, arguments, *rest

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As stock's, and takes the names that `save_pretrained` writes, which are older than today's modules.

        `Trainer` loads its checkpoints in this way. Stock models skip those names there, and keep their weights.
        """
        return super().load_state_dict(_with_names_of(self, state_dict), *args, **kwargs)


def _unborn(name: str) -> Any:
    """For `pickle`: an empty instance."""
    cls = getattr(deit_fast.transformers, name)
    return cls.__new__(cls)


def _with_names_of(model: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    # Not state_dict(), for which sharded models gather their weights.
    own = {name for found in (model.named_parameters, model.named_buffers) for name, _ in found(remove_duplicate=False)}
    if not isinstance(state_dict, Mapping) or state_dict.keys() <= own:
        return state_dict  # torch says what is wrong with anything else
    changes = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [each for each in changes if isinstance(each, WeightRenaming)]
    converters = [each for each in changes if isinstance(each, WeightConverter)]
    return {
        name if name in own else rename_source_key(name, renamings, converters)[0]: value
        for name, value in state_dict.items()
    }


def swapped_class(stock: type[Module]) -> Any:
    """What `swap` makes of it, which is itself where only its modules change."""
    return RULES[stock].swapped if stock in RULES else stock


_DeiTModel: Any = swapped_class(modeling_deit.DeiTModel)
_DeiTForMaskedImageModeling: Any = swapped_class(modeling_deit.DeiTForMaskedImageModeling)
_DeiTForImageClassification: Any = swapped_class(modeling_deit.DeiTForImageClassification)
_ViTModel: Any = swapped_class(modeling_vit.ViTModel)
_ViTForImageClassification: Any = swapped_class(modeling_vit.ViTForImageClassification)


class DeiTModel(BornSwapped, _DeiTModel):
    __module__ = modeling_deit.__name__


class DeiTForMaskedImageModeling(BornSwapped, _DeiTForMaskedImageModeling):
    __module__ = modeling_deit.__name__


class DeiTForImageClassification(BornSwapped, _DeiTForImageClassification):
    __module__ = modeling_deit.__name__


class ViTModel(BornSwapped, _ViTModel):
    __module__ = modeling_vit.__name__


class ViTForImageClassification(BornSwapped, _ViTForImageClassification):
    __module__ = modeling_vit.__name__
