"""Swaps every DeiT and ViT that a program builds, as soon as it is built, for programs that don't know of deit_fast."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch.nn import Module

from deit_fast.swap.core import swap
from deit_fast.swap.report import SwapReport

# Called with each model and its report, or with what kept the model from being swapped.
Born = Callable[[Module, SwapReport | ImportError], None]


@contextmanager
def swapped_at_birth(born: Born) -> Iterator[None]:
    """Within the block, the models of timm and transformers that `swap` knows are swapped when they have been built.

    They are those whose class is built (or a class that is derived from one), and those of timm's `create_model`: the
    original repository registers its models there. A class is looked after when its library is first imported, so
    that a program which builds none imports none.
    """
    makers = _Makers(born)
    finder = _AfterImport(makers)
    for name in _MAKERS:
        if name in sys.modules:
            makers.replace_in(sys.modules[name])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        makers.put_back()


def _classes(*names: str) -> Callable[[ModuleType], list[tuple[Any, str]]]:
    return lambda library: [(getattr(library, name), "__init__") for name in names]


# Module → what makes models in it: (owner, name of a function of its). Of a class, its subclasses' constructors too.
_MAKERS: dict[str, Callable[[ModuleType], list[tuple[Any, str]]]] = {
    "timm.models.vision_transformer": _classes("VisionTransformer"),
    # timm hands it on by name: it must be ours before `timm.models` is imported whole.
    "timm.models._factory": lambda library: [(library, "create_model")],
    # Its name in releases before 0.8, among them those that the original repository was written for.
    "timm.models.factory": lambda library: [(library, "create_model")],
    **{
        f"transformers.models.{name.lower()}.modeling_{name.lower()}": _classes(
            *(f"{name}{suffix}" for suffix in suffixes)
        )
        for name, suffixes in {
            "DeiT": ("Model", "ForMaskedImageModeling", "ForImageClassification", "ForImageClassificationWithTeacher"),
            "ViT": ("Model", "ForMaskedImageModeling", "ForImageClassification"),
        }.items()
    },
}


class _AfterImport(MetaPathFinder):
    """Calls `makers` with each module of _MAKERS once its code has run."""

    def __init__(self, makers: "_Makers"):
        self.makers = makers

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _MAKERS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.makers.replace_in(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Makers:
    """The functions that were replaced, each by one that swaps what it made unless a maker around it is at work."""

    def __init__(self, born: Born):
        self.born = born
        self.at_work = threading.local()
        # (owner, name, what it had by this name itself, or None), in order.
        self.replaced: list[tuple[Any, str, Any]] = []

    def replace_in(self, library: ModuleType) -> None:
        for owner, name in _MAKERS[library.__name__](library):
            if isinstance(owner, type):
                self.watch(owner)
            else:
                self.replace(owner, name, self.swapping(vars(owner)[name]))

    def watch(self, cls: type) -> None:
        """`cls` and what is derived from it from now on."""

        def __init_subclass__(derived: type, **kwargs: Any) -> None:
            super(cls, derived).__init_subclass__(**kwargs)  # type: ignore[arg-type]
            self.replace_constructor(derived)

        self.replace_constructor(cls)
        self.replace(cls, "__init_subclass__", classmethod(__init_subclass__))

    def replace_constructor(self, cls: type) -> None:
        if "__init__" in vars(cls):
            self.replace(cls, "__init__", self.swapping(vars(cls)["__init__"]))

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self.replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def put_back(self) -> None:
        for owner, name, before in reversed(self.replaced):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def swapping(self, make: Callable) -> Callable:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.at_work, "now", False):
                return make(*args, **kwargs)
            self.at_work.now = True
            try:
                result = make(*args, **kwargs)
            finally:
                self.at_work.now = False
            # A constructor makes its first argument.
            self.swap(args[0] if make.__name__ == "__init__" else result)
            return result

        return made

    def swap(self, model: Module) -> None:
        try:
            report: SwapReport | ImportError = swap(model)
        except ImportError as error:
            report = error
        except ValueError:
            return  # another architecture
        self.born(model, report)
