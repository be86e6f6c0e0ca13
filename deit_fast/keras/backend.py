"""Which Keras there is: 3.12 or newer, on PyTorch."""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version

from deit_fast._extras import require

_INSTALL = 'pip install "deit_fast[keras]"'
_REMEDY = "set KERAS_BACKEND=torch in the environment, before keras is imported"


def require_keras() -> None:
    """Imports keras on the torch backend.

    Where keras is not imported yet and the environment has no KERAS_BACKEND, it is set to torch for this process and
    those that it starts. It overrides the backend in ~/.keras/keras.json.

    Raises:
        ImportError: keras is missing, older than 3.12, or on another backend; the message says what to do.
    """
    try:
        found = version("keras")
    except PackageNotFoundError:
        found = None  # `require` says so, unless it lies on the path without its metadata
    if found is not None and [int(number) for number in re.findall(r"\d+", found)] < [3, 12]:
        raise ImportError(f"deit_fast.keras needs keras 3.12 or newer, found {found}: {_INSTALL}")
    if "keras" not in sys.modules:
        wanted = os.environ.setdefault("KERAS_BACKEND", "torch")
        if wanted != "torch":
            raise ImportError(f"deit_fast.keras runs on PyTorch, and KERAS_BACKEND is {wanted!r}: {_REMEDY}")
    backend = require("keras", extra="keras").backend.backend()
    if backend != "torch":
        raise ImportError(f"deit_fast.keras runs on PyTorch, and keras was imported with {backend!r}: {_REMEDY}")
