"""Sends Python objects between ranks without pickle: JSON for the structure, raw bytes for the arrays.

A pickle from the network can run any code; a JSON decoder cannot. Supported are None, bool, int, float, complex, str,
bytes, paths, NumPy arrays of numbers (those of ml_dtypes, such as bfloat16 and float8, included), and the containers of
``lentando.comm.containers`` with keys of these kinds.
"""

import json
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from lentando.comm.containers import children, mapped, shortened
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.errors import ConfigurationError
from lentando.comm.numbering import numbers_of
from lentando.comm.transport import Array, Transport, as_bytes

__all__ = ["allgather_object", "broadcast_object", "can_travel", "decode", "encode", "from_json", "to_json"]

FACTORIES: dict[str | None, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
}
"""Factories that a ``defaultdict`` may have, by name."""


def encode(value: object) -> bytes:
    """Encode an object of the supported types as bytes.

    Raises:
        ConfigurationError: for an object of any other type; the message names its location.

    Example:
        >>> decode(encode({"steps": 3, "x": np.arange(2.0)}))
        {'steps': 3, 'x': array([0., 1.])}
    """
    arrays: list[Array] = []
    described = _to_json(value, arrays, "the object")
    try:
        structure = json.dumps(described).encode()
    except ValueError as error:  # an integer that Python does not write in decimal digits, because it is so long
        raise ConfigurationError(f"the object cannot be sent: {error}") from error
    # Arrays are sent in this machine's byte order: the name of a dtype, such as float32, does not contain it.
    native = (array.astype(array.dtype.newbyteorder("="), copy=False).tobytes() for array in arrays)
    return b"".join([len(structure).to_bytes(8, "little"), structure, *native])


def decode(data: bytes) -> Any:
    """Decode the bytes that ``encode`` returns. Arrays are new and writable."""
    length = int.from_bytes(data[:8], "little")
    position = 8 + length

    def take(dtype: str, shape: list[int]) -> Array:
        nonlocal position
        array = np.empty(shape, numpy_dtype(dtype))
        as_bytes(array)[...] = np.frombuffer(data, np.uint8, array.nbytes, position)
        position += array.nbytes
        return array

    return _from_json(json.loads(data[8:position]), take)


def to_json(value: object, where: str = "the object") -> Any:
    """Convert an object without arrays to strict JSON, to be written to a file.

    Args:
        value: object of the supported types.
        where: description of the object, for messages.

    Raises:
        ConfigurationError: for an object of any other type, or an array; the message names its location.
    """
    arrays: list[Array] = []
    structure = _to_json(value, arrays, where)
    if arrays:
        raise ConfigurationError(f"{where} holds arrays, which JSON cannot hold")
    return structure


def from_json(structure: Any) -> Any:
    """Convert the result of ``to_json`` back to the object."""

    def take(dtype: str, shape: list[int]) -> Array:
        raise ConfigurationError(f"expected JSON without arrays, found one of {dtype} and shape {shape}")

    return _from_json(structure, take)


def broadcast_object(
    transport: Transport, value: object, root: int = 0, plain: Callable[[Any], Any] | None = None
) -> Any:
    """Return the root's ``value`` on every rank. Collective.

    Args:
        transport: transport that connects the participating ranks.
        value: object of the supported types; ignored on all ranks but the root.
        root: rank whose value all ranks get.
        plain: converts ``value`` to the supported types; its ``ConfigurationError`` is raised on every rank.

    Raises:
        ConfigurationError: on every rank, if the root's value cannot be encoded.
    """
    payload, failed = _encode_or_explain(value, plain) if transport.rank == root else (b"", False)
    header = np.array([len(payload), failed], np.int64)
    transport.broadcast(header, root)
    buffer = np.empty(int(header[0]), np.uint8)
    if transport.rank == root:
        buffer[...] = np.frombuffer(payload, np.uint8)
    transport.broadcast(buffer, root)
    if header[1]:
        raise ConfigurationError(f"on rank {numbers_of(transport)[root]}: {buffer.tobytes().decode()}")
    return decode(buffer.tobytes())


def allgather_object(transport: Transport, value: object, plain: Callable[[Any], Any] | None = None) -> list[Any]:
    """Return the values of all ranks, by rank. Collective.

    Args:
        transport: transport that connects the participating ranks.
        value: object of the supported types.
        plain: converts ``value`` to the supported types; its ``ConfigurationError`` is raised on every rank.

    Raises:
        ConfigurationError: on every rank, if the value of one of them cannot be encoded.
    """
    payload, failed = _encode_or_explain(value, plain)
    headers = transport.allgather(np.array([len(payload), failed], np.int64))
    padded = np.zeros(int(headers[:, 0].max()), np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    gathered = transport.allgather(padded)
    texts = [gathered[rank, :length].tobytes() for rank, length in enumerate(headers[:, 0])]
    if headers[:, 1].any():
        rank = int(headers[:, 1].argmax())
        raise ConfigurationError(f"on rank {numbers_of(transport)[rank]}: {texts[rank].decode()}")
    return [decode(text) for text in texts]


def _encode_or_explain(value: object, plain: Callable[[Any], Any] | None) -> tuple[bytes, bool]:
    """Encode a value, or the error message in its place, so that no rank waits for a value that is never sent.

    Returns:
        the bytes, and whether they are an error message.
    """
    try:
        return encode(value if plain is None else plain(value)), False
    except ConfigurationError as error:
        return str(error).encode(), True


def _to_json(value: Any, arrays: list[Array], where: str) -> Any:
    """Convert nested containers to JSON. A type that JSON lacks becomes a dict that maps its name to its content."""

    def number(value: float) -> Any:
        return float(value) if isfinite(value) else {"float": str(float(value))}  # JSON has no NaN and no infinity

    def leaf(value: Any, where: str) -> Any:
        if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
            return value
        if isinstance(value, float):
            return number(value)
        if isinstance(value, np.ndarray | np.generic) and can_travel(value.dtype):
            arrays.append(np.asarray(value))
            return {"array" if isinstance(value, np.ndarray) else "scalar": [value.dtype.name, list(value.shape)]}
        if type(value) is complex:
            return {"complex": [number(value.real), number(value.imag)]}
        if type(value) in (bytes, bytearray):
            return {type(value).__name__: b64encode(value).decode()}
        if isinstance(value, Path):
            return {"path": str(value)}
        raise ConfigurationError(f"{shortened(where)} {_why_not(value)}")

    def container(value: Any, where: str) -> Any:
        contents = children(value)
        if contents is None:
            return leaf(value, where)
        items = [container(item, where + location) for location, item in contents]
        if not isinstance(value, dict):
            return {type(value).__name__: items}
        keys = [container(key, f"a key of {where}") for key in value]
        pairs = [list(pair) for pair in zip(keys, items, strict=True)]
        if not isinstance(value, defaultdict):
            return {type(value).__name__: pairs}
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if factory is not None and FACTORIES.get(name) is not factory:
            raise ConfigurationError(
                f"{shortened(where)} is a defaultdict of {factory!r}, which cannot be sent: send dict(value)"
            )
        return {"defaultdict": [name, pairs]}

    mapped(value, lambda value, where: None, where)  # raises an error for cycles
    return container(value, where)


def can_travel(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this dtype are numbers: NumPy's own, or one of ml_dtypes (bfloat16, float8, ...)."""
    return dtype.kind in "biufc" or (dtype.isbuiltin == 2 and dtype.kind == "V")


def _why_not(value: object) -> str:
    """The reason why a value cannot be sent, as the end of a sentence."""
    kind = type(value).__name__
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"is a namedtuple {kind}, whose class cannot be sent: send tuple(value), or value._asdict()"
    if isinstance(value, Enum):
        return f"is a member of the enumeration {kind}, which cannot be sent: send value.value"
    if hasattr(value, "state_dict"):
        return f"is a {kind}, which cannot be sent: send its state_dict(), and load that with load_state_dict()"
    for base in (dict, list, tuple, set, frozenset):
        if isinstance(value, base):
            return f"is a {kind}, which would be decoded as a {base.__name__}: send {base.__name__}(value)"
    if isinstance(value, np.ndarray | np.generic):
        kind = f"{kind} of dtype {shortened(str(value.dtype))}"
    return (
        f"is a {kind}: only None, bool, int, float, complex, str, bytes, Path, list, tuple, set, dict (OrderedDict, "
        "Counter, defaultdict) and arrays of numbers can be sent between ranks and saved in "
        "checkpoints (there is no pickle, which could run any code)"
    )


def _from_json(value: Any, take: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _SIMPLE:
        return _SIMPLE[kind](content)
    if kind == "complex":
        return complex(*(_from_json(part, take) for part in content))
    if kind == "array":
        return take(*content)
    if kind == "scalar":
        return take(*content)[()]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_from_json(item, take) for item in content)
    factory = None
    if kind == "defaultdict":
        name, content = content
        factory = None if name is None else FACTORIES[name]
    pairs = {_from_json(key, take): _from_json(item, take) for key, item in content}
    if kind == "defaultdict":
        return defaultdict(factory, pairs)
    return pairs if kind == "dict" else _DICTIONARIES[kind](pairs)


_SIMPLE: dict[str, Callable[[str], Any]] = {
    "float": float,
    "bytes": b64decode,
    "bytearray": lambda text: bytearray(b64decode(text)),
    "path": Path,
}
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
_DICTIONARIES: dict[str, Callable[[dict[Any, Any]], Any]] = {"OrderedDict": OrderedDict, "Counter": Counter}
