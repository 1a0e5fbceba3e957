"""Python objects between ranks without pickle: JSON for the structure, raw bytes for the arrays.

A pickle from the network can run any code; a decoder of JSON cannot. Allowed are None, bool, int, float, complex, str,
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
from lentando.comm.transport import Array, Transport, as_bytes

__all__ = ["allgather_object", "broadcast_object", "can_travel", "decode", "encode", "from_json", "to_json"]

FACTORIES: dict[str | None, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
}
"""What a ``defaultdict`` that travels may call, by name."""


def encode(value: object) -> bytes:
    """``value`` as bytes.

    Raises:
        ConfigurationError: for an object of any other kind; names where it is.
    """
    arrays: list[Array] = []
    described = _to_json(value, arrays, "the object")
    try:
        structure = json.dumps(described).encode()
    except ValueError as error:  # an integer that Python does not write in decimal digits, because it is so long
        raise ConfigurationError(f"the object cannot be sent: {error}") from error
    # Arrays travel in this machine's byte order, whatever they were made in: a name such as float32 does not tell it.
    native = (array.astype(array.dtype.newbyteorder("="), copy=False).tobytes() for array in arrays)
    return b"".join([len(structure).to_bytes(8, "little"), structure, *native])


def decode(data: bytes) -> Any:
    """The object that ``encode`` was given. Arrays come back as new, writable arrays."""
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
    """``value``, which holds no arrays, as what strict JSON can hold, to be written into a file.

    Raises:
        ConfigurationError: for an object of any other kind; names where it is.
    """
    arrays: list[Array] = []
    structure = _to_json(value, arrays, where)
    if arrays:
        raise ConfigurationError(f"{where} holds arrays, which JSON cannot hold")
    return structure


def from_json(structure: Any) -> Any:
    """The object that ``to_json`` was given."""

    def take(dtype: str, shape: list[int]) -> Array:
        raise ConfigurationError(f"expected JSON without arrays, found one of {dtype} and shape {shape}")

    return _from_json(structure, take)


def broadcast_object(
    transport: Transport, value: object, root: int = 0, plain: Callable[[Any], Any] | None = None
) -> Any:
    """The root's ``value`` on every rank; what the others pass is ignored.

    Args:
        transport: ranks that take part.
        value: see above.
        root: rank.
        plain: makes what can be encoded of ``value``; its ``ConfigurationError`` is raised on every rank.

    Raises:
        ConfigurationError: on every rank, if the root's value cannot be encoded.
    """
    payload, failed = _encode_or_say_why_not(value, plain) if transport.rank == root else (b"", False)
    header = np.array([len(payload), failed], np.int64)
    transport.broadcast(header, root)
    buffer = np.empty(int(header[0]), np.uint8)
    if transport.rank == root:
        buffer[...] = np.frombuffer(payload, np.uint8)
    transport.broadcast(buffer, root)
    if header[1]:
        raise ConfigurationError(f"on rank {root}: {buffer.tobytes().decode()}")
    return decode(buffer.tobytes())


def allgather_object(transport: Transport, value: object, plain: Callable[[Any], Any] | None = None) -> list[Any]:
    """Every rank's ``value``, by rank.

    Args:
        transport: ranks that take part.
        value: see above.
        plain: see ``broadcast_object``.

    Raises:
        ConfigurationError: on every rank, if the value of one of them cannot be encoded.
    """
    payload, failed = _encode_or_say_why_not(value, plain)
    headers = transport.allgather(np.array([len(payload), failed], np.int64))
    padded = np.zeros(int(headers[:, 0].max()), np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    gathered = transport.allgather(padded)
    texts = [gathered[rank, :length].tobytes() for rank, length in enumerate(headers[:, 0])]
    if headers[:, 1].any():
        rank = int(headers[:, 1].argmax())
        raise ConfigurationError(f"on rank {rank}: {texts[rank].decode()}")
    return [decode(text) for text in texts]


def _encode_or_say_why_not(value: object, plain: Callable[[Any], Any] | None) -> tuple[bytes, bool]:
    """The error travels in place of the value, so that nobody waits for a value that never comes."""
    try:
        return encode(value if plain is None else plain(value)), False
    except ConfigurationError as error:
        return str(error).encode(), True


def _to_json(value: Any, arrays: list[Array], where: str) -> Any:
    """JSON for nested containers. What JSON lacks is a dict of one entry, from its kind to its content."""

    def number(value: float) -> Any:
        return float(value) if isfinite(value) else {"float": str(float(value))}  # JSON knows no NaN and no infinity

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
        found = children(value)
        if found is None:
            return leaf(value, where)
        items = [container(item, where + place) for place, item in found]
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
                f"{shortened(where)} is a defaultdict of {factory!r}, which does not travel: send dict(value)"
            )
        return {"defaultdict": [name, pairs]}

    mapped(value, lambda value, where: None, where)  # it has an end
    return container(value, where)


def can_travel(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this dtype are numbers: NumPy's own, or one of ml_dtypes (bfloat16, float8, ...)."""
    return dtype.kind in "biufc" or (dtype.isbuiltin == 2 and dtype.kind == "V")


def _why_not(value: object) -> str:
    """Why a value does not travel, after its place."""
    kind = type(value).__name__
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"is a namedtuple {kind}, whose class does not travel: send tuple(value), or value._asdict()"
    if isinstance(value, Enum):
        return f"is a member of the enumeration {kind}, which does not travel: send value.value"
    for base in (dict, list, tuple, set, frozenset):
        if isinstance(value, base):
            return f"is a {kind}, which would come back as a {base.__name__}: send {base.__name__}(value)"
    if isinstance(value, np.ndarray | np.generic):
        kind = f"{kind} of dtype {shortened(str(value.dtype))}"
    return (
        f"is a {kind}: only None, bool, int, float, complex, str, bytes, Path, list, tuple, set, dict (OrderedDict, "
        "Counter, defaultdict) and arrays of numbers travel between ranks and into "
        "checkpoints (no pickle: it could run anything)"
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
