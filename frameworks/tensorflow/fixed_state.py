"""What layers compute with beside their weights: constants made by ``adapt``, vocabularies, bins, salts of hashes."""

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
"""Settings that say nothing about what a layer computes, or that are compared as the layer now has them."""
SHOWN = 100
"""Characters of a value in a message."""

_WITHOUT_WEIGHTS = (
    keras.layers.CategoryEncoding,
    keras.layers.Discretization,
    keras.layers.HashedCrossing,
    keras.layers.Hashing,
    keras.layers.Rescaling,
)


def adapted_layers(model: keras.Model | None) -> list[Any]:
    """Layers that compute with a copy of their weights, which ``adapt`` makes: ``keras.layers.Normalization``."""
    return [layer for _, layer in _layers(model) if hasattr(layer, "finalize_state") and layer.weights]


def finalize(model: keras.Model, layers: Sequence[Any]) -> None:
    """Let layers compute with the weights that they have now, also in what the model has compiled before."""
    before = [_constants(layer) for layer in layers]
    for layer in layers:
        layer.finalize_state()
    if before != [_constants(layer) for layer in layers]:
        for kind in ("train", "test", "predict"):
            if getattr(model, f"{kind}_function", None) is not None:
                getattr(model, f"make_{kind}_function")(force=True)


def fixed_state(model: keras.Model | None) -> list[tuple[str, dict[str, str]]]:
    """What decides what layers compute and is in no weight: each layer in words, with that by what it is called."""
    return [
        (f"{name!r} ({type(layer).__name__})", {key: _in_words(value) for key, value in _state(layer).items()})
        for name, layer in _layers(model)
        if isinstance(layer, _WITHOUT_WEIGHTS) or hasattr(layer, "adapt") or hasattr(layer, "save_assets")
    ]


def check_synchronized(model: keras.Model | None, size: int) -> None:
    """Refuse layers that are to compute with the batches of all ranks, which Keras does for ``tf.distribute`` alone.

    Raises:
        ConfigurationError: on several ranks, if there is such a layer.
    """
    found = [name for name, layer in _layers(model) if getattr(layer, "synchronized", False)]
    if found and size > 1:
        raise ConfigurationError(
            f"synchronized=True of the layer {found[0]!r} has no effect here: it would normalize by the batch of its "
            "own rank. Leave it out, which is the same, or use GroupNormalization, or larger batches. The statistics "
            "are averaged at outer steps"
        )


def _layers(owner: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All layers, also those that other layers hold, with their names. Keras has no public list of them."""
    if owner is not None:
        for layer in tracked_layers(owner):
            yield f"{prefix}{layer.name}", layer
            yield from _layers(layer, f"{prefix}{layer.name}/")


def _state(layer: Any) -> dict[str, Any]:
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
    """A user's layer needs to have none."""
    try:
        return dict(layer.get_config())
    except NotImplementedError:
        return {}


def _constants(layer: Any) -> dict[str, Any]:
    """What ``finalize_state`` has made."""
    if not hasattr(layer, "finalize_state"):
        return {}
    found = {name: getattr(layer, name, None) for name in ("mean", "variance", "idf_weights_const")}
    return {name: np.asarray(value).tolist() for name, value in found.items() if value is not None}


def _assets(layer: Any) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        layer.save_assets(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {f"file {path.relative_to(folder)}": path.read_bytes() for path in files}


def _in_words(value: Any) -> str:
    text = re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))  # of functions: where they are in memory
    if len(text) <= SHOWN:
        return text
    count = f"{len(value)} entries, " if isinstance(value, list | tuple) else ""
    return f"{text[:SHOWN]}... ({count}checksum {blake2b(text.encode(), digest_size=4).hexdigest()})"
