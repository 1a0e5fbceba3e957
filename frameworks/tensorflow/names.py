"""Names of the variables of a Keras model that are equal on every rank, whatever else a rank has built before."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras

__all__ = ["by_number", "by_number_alone", "layers_of", "names_of"]


def names_of(variables: Sequence[Any], model: keras.Model | None) -> list[str]:
    """A unique name for each variable: its path, such as ``"dense/kernel"``.

    Keras numbers the layers that it names, as in ``dense_7``, over all models of a process. With a ``model``, they are
    numbered as if it were the first one.
    """
    renamed = {} if model is None else _renumbered(variables, model)
    names: list[str] = []
    for variable in variables:
        path = getattr(variable, "path", None) or variable.name.partition(":")[0]
        name = "/".join(renamed.get(part, part) for part in path.split("/"))
        same = sum(earlier == name or earlier.startswith(f"{name} (") for earlier in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def by_number(variables: Sequence[Any]) -> dict[str, Any]:
    """Variables by their number and the last part of their path: ``0 kernel``.

    For broadcasts to ranks that have named the same layers otherwise, such as a rank that has loaded its model.
    """
    paths = [getattr(variable, "path", None) or variable.name for variable in variables]
    return {f"{n} {path.rpartition('/')[2]}": v for n, (path, v) in enumerate(zip(paths, variables, strict=True))}


def by_number_alone(variables: Sequence[Any]) -> dict[str, Any]:
    """Variables of an optimizer by their number: it names them after the model's, which ranks may name otherwise."""
    return {str(number): variable for number, variable in enumerate(variables)}


def layers_of(model: Any) -> Iterator[Any]:
    """The model and its layers, recursively for layers that are models."""
    yield model
    for layer in getattr(model, "layers", ()):
        yield from layers_of(layer)


def _renumbered(variables: Sequence[Any], model: keras.Model) -> dict[str, str]:
    """New names of the layers that Keras has numbered, by their names."""
    kinds = {layer.name: _snake_case(type(layer).__name__) for layer in layers_of(model)}
    counts: dict[str, int] = {}
    renamed: dict[str, str] = {}
    for variable in variables:
        for part in getattr(variable, "path", "").split("/"):
            kind = kinds.get(part)
            if kind is not None and part not in renamed and re.fullmatch(rf"{kind}(_\d+)?", part):
                count = counts[kind] = counts.get(kind, -1) + 1
                renamed[part] = f"{kind}_{count}" if count else kind
    return renamed


def _snake_case(name: str) -> str:
    """The name that Keras derives from the class of a layer."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
