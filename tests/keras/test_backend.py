"""deit_fast.keras without the Keras that it needs."""

import importlib.metadata
import os
import sys

import pytest

keras = pytest.importorskip("keras")

from deit_fast.keras import backend  # noqa: E402


def without(monkeypatch, library):
    """As if the program had not imported it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)


def test_another_backend_in_the_environment_is_refused(monkeypatch):
    without(monkeypatch, "keras")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(ImportError, match=r"KERAS_BACKEND is 'jax': set KERAS_BACKEND=torch .* before keras is"):
        backend.require_keras()
    assert "keras" not in sys.modules


def test_keras_on_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(ImportError, match="keras was imported with 'tensorflow': set KERAS_BACKEND=torch"):
        backend.require_keras()


@pytest.mark.parametrize("found", ["2.15.0", "3.0.0", "3.9.2", "3.11.3"])
def test_an_older_keras_is_refused(found, monkeypatch):
    monkeypatch.setattr(backend, "version", lambda name: found)
    needed = rf'needs keras 3\.12 or newer, found {found}: pip install "deit_fast\[keras\]"'
    with pytest.raises(ImportError, match=needed):
        backend.require_keras()


@pytest.mark.parametrize("found", ["3.12.0", "3.15.1", "3.16rc1", "4.0"])
def test_a_newer_keras_is_taken(found, monkeypatch):
    monkeypatch.setattr(backend, "version", lambda name: found)
    backend.require_keras()


def test_an_error_names_the_extra_where_keras_is_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r'pip install "deit_fast\[keras\]"'):
        backend.require_keras()


def test_torch_is_chosen_where_nobody_has_chosen(monkeypatch):
    without(monkeypatch, "keras")
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setattr(backend, "require", lambda *_, **__: keras)
    backend.require_keras()
    assert os.environ["KERAS_BACKEND"] == "torch"
