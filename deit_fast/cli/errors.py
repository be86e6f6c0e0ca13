"""Mistakes of a user: one message on stderr and exit code 2, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A message for the user; `main` prints it and exits with code 2."""


@contextmanager
def user_input() -> Iterator[None]:
    """Turn what bad input raises into a UserError: around the reading of input, never around computation."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
