"""How a module of this package finds its names in Lentando."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NoReturn


def module(*candidates: str) -> Any:
    """The first of the modules that exists, or the last."""
    for name in candidates[:-1]:
        parent = importlib.import_module(name.rpartition(".")[0])
        if importlib.util.find_spec(name, parent.__name__):
            return importlib.import_module(name)
    return importlib.import_module(candidates[-1])


def attribute_of(source: Any) -> Callable[[str], Any]:
    """A module's ``__getattr__``: an unknown name is an AttributeError where it is used."""

    def attribute(name: str) -> Any:
        return getattr(source, name)

    return attribute


def attribute_or_refusal(source: Any) -> Callable[[str], Any]:
    """The same for modules from which tests import names: an unknown one fails when it is called, not the import."""

    def attribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refused(*arguments: object, **settings: object) -> NoReturn:
            raise AttributeError(f"{source.__name__} has no attribute {name!r}")

        return getattr(source, name, refused)

    return attribute
