"""Which Keras there is: 3 or newer, on PyTorch."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version

from deit_fast._extras import require

_INSTALL = 'pip install "deit_fast[keras]"'
_REMEDY = "set KERAS_BACKEND=torch in the environment, before keras is imported"


def require_keras() -> None:
    """Imports keras on the torch backend, which is chosen here where neither the program nor the environment has one.

    Raises:
        ImportError: keras is missing, older than 3, or on another backend; the message says what to do.
    """
    try:
        found = version("keras")
    except PackageNotFoundError:
        found = None  # `require` says so, unless it lies on the path without its metadata
    if found is not None and int(found.partition(".")[0]) < 3:
        raise ImportError(f"deit_fast.keras needs keras 3 or newer, found {found}: {_INSTALL}")
    if "keras" not in sys.modules:
        wanted = os.environ.setdefault("KERAS_BACKEND", "torch")
        if wanted != "torch":
            raise ImportError(f"deit_fast.keras runs on PyTorch, and KERAS_BACKEND is {wanted!r}: {_REMEDY}")
    backend = require("keras", extra="keras").backend.backend()
    if backend != "torch":
        raise ImportError(f"deit_fast.keras runs on PyTorch, and keras was imported with {backend!r}: {_REMEDY}")
