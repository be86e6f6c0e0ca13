"""Optional libraries: imported where they are used, and named by their extra when they are missing."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` and return it.

    Raises:
        ImportError: ``module`` is not installed; the message says which extra of deit_fast brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module missing somewhere inside an installed library is not for our extra to mend.
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ImportError(
            f'{module} is needed here and is not installed: pip install "deit_fast[{extra}]"', name=module
        ) from error
