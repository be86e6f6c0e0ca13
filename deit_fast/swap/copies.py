"""Copies of a swapped module are swapped; what leaves the process is stock, and opens where deit_fast is not."""

import copy
from typing import Any

# A mixin's base: none, though type checkers let it use whatever the stock class behind it has.
Mixin: Any = object

# What a swapped module carries beside what the stock module does.
OWN = (
    "_deit_fast_memory",
    "_deit_fast_readout",
    "_deit_fast_compact",
    "_deit_fast_calls",
    "_deit_fast_drawn",
    "_deit_fast_rows",
    "readout_rows",
)
# Set in the place of its class on a module whose class somebody derived from ours: it is stock.
RESTORED = "_deit_fast_restored"


class Swapped(Mixin):
    """In front of the stock class in every swapped one, which has that as `_deit_fast_stock`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For pickles, so for `torch.save` and spawned processes: the stock module."""
        made_by, arguments, state, *rest = super().__reduce_ex__(max(protocol, 2))
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in OWN}
        # A class that somebody derived from ours is pickled by its name, as theirs.
        if "_deit_fast_stock" in vars(type(self)):
            made_by, arguments = object.__new__, (self._deit_fast_stock,)
        return made_by, arguments, state, *rest

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
