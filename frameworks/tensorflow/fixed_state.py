"""What layers compute with in addition to weights: constants made by ``adapt``, vocabularies, bins, hash salts."""

import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.tensorflow.keras_internals import tracked_layers

__all__ = ["adapted_layers", "check_synchronized", "finalize", "fixed_state"]

NOT_COMPARED = {"name", "dtype", "trainable", "vocabulary", "idf_weights"}
"""Settings that do not affect what a layer computes, or whose current values are compared instead."""
SHOWN_CHARACTERS = 100
"""Longest text of a value in a message."""

_WITHOUT_WEIGHTS = (
    keras.layers.CategoryEncoding,
    keras.layers.Discretization,
    keras.layers.HashedCrossing,
    keras.layers.Hashing,
    keras.layers.Rescaling,
)


def adapted_layers(model: keras.Model | None) -> list[Any]:
    """Layers that compute with a copy of their weights made by ``adapt``, such as ``keras.layers.Normalization``."""
    return [layer for _, layer in _layers(model) if hasattr(layer, "finalize_state") and layer.weights]


def finalize(model: keras.Model, layers: Sequence[Any]) -> None:
    """Make adapted layers use their current weights, also in functions that the model has compiled already."""
    before = [_constants(layer) for layer in layers]
    for layer in layers:
        layer.finalize_state()
    if before != [_constants(layer) for layer in layers]:
        for kind in ("train", "test", "predict"):
            if getattr(model, f"{kind}_function", None) is not None:
                getattr(model, f"make_{kind}_function")(force=True)


def fixed_state(model: keras.Model | None) -> list[tuple[str, dict[str, str]]]:
    """State outside the weights that affects what layers compute: values as text by name, for each such layer."""
    return [
        (f"{name!r} ({type(layer).__name__})", {key: _as_text(value) for key, value in _state(layer).items()})
        for name, layer in _layers(model)
        if isinstance(layer, _WITHOUT_WEIGHTS) or hasattr(layer, "adapt") or hasattr(layer, "save_assets")
    ]


def check_synchronized(model: keras.Model | None, size: int) -> None:
    """Reject layers that normalize by the batches of all ranks, which Keras supports with ``tf.distribute`` only.

    Args:
        model: the user's model; None if it is not known.
        size: number of ranks.

    Raises:
        ConfigurationError: on several ranks, if the model contains such a layer.
    """
    synchronized = [name for name, layer in _layers(model) if getattr(layer, "synchronized", False)]
    if synchronized and size > 1:
        raise ConfigurationError(
            f"synchronized=True of the layer {synchronized[0]!r} has no effect here: the layer would normalize by the "
            "batch of its own rank. Leave it out, which is the same, or use GroupNormalization, or larger batches. The "
            "statistics are averaged at outer steps"
        )


def _layers(owner: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All layers at any depth, with their paths of names."""
    if owner is not None:
        for layer in tracked_layers(owner):
            yield f"{prefix}{layer.name}", layer
            yield from _layers(layer, f"{prefix}{layer.name}/")


def _state(layer: Any) -> dict[str, Any]:
    """Everything outside the weights that affects what a layer computes, by name."""
    state = {key: value for key, value in _configuration(layer).items() if key not in NOT_COMPARED}
    state |= _constants(layer)
    if hasattr(layer, "get_vocabulary"):
        state["vocabulary"] = layer.get_vocabulary()
    elif hasattr(layer, "save_assets"):
        state |= _assets(layer)
    if not layer.weights and not type(layer).__module__.startswith("keras."):
        store: dict[str, Any] = {}
        layer.save_own_variables(store)
        state |= {f"variable {key}": np.asarray(value).tolist() for key, value in store.items()}
    return state


def _configuration(layer: Any) -> dict[str, Any]:
    """The layer's configuration; empty for a layer of the user's without ``get_config``."""
    try:
        return dict(layer.get_config())
    except NotImplementedError:
        return {}


def _constants(layer: Any) -> dict[str, Any]:
    """The constants that ``finalize_state`` computes from the weights."""
    if not hasattr(layer, "finalize_state"):
        return {}
    constants = {name: getattr(layer, name, None) for name in ("mean", "variance", "idf_weights_const")}
    return {name: np.asarray(value).tolist() for name, value in constants.items() if value is not None}


def _assets(layer: Any) -> dict[str, Any]:
    """The files that a layer saves next to its weights, such as vocabularies."""
    with TemporaryDirectory() as folder:
        layer.save_assets(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {f"file {path.relative_to(folder)}": path.read_bytes() for path in files}


def _as_text(value: Any) -> str:
    """A value as text, equal on all ranks for equal values; long values as a checksum."""
    text = re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))  # the addresses of functions differ between ranks
    if len(text) <= SHOWN_CHARACTERS:
        return text
    count = f"{len(value)} entries, " if isinstance(value, list | tuple) else ""
    return f"{text[:SHOWN_CHARACTERS]}... ({count}checksum {blake2b(text.encode(), digest_size=4).hexdigest()})"
