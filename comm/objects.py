"""Python objects between ranks without pickle: JSON for the structure, raw bytes for the arrays.

A pickle from the network can run any code; a decoder of JSON cannot. Allowed are None, bool, int, float, str, list,
tuple, dict (with keys of these kinds) and NumPy arrays of numbers, nested as one likes.
"""

import json
from math import isfinite
from typing import Any

import numpy as np

from lentando.comm.dtypes import bfloat16, numpy_dtype
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array, Transport, as_bytes

__all__ = ["allgather_object", "broadcast_object", "decode", "encode", "from_json", "to_json"]


def encode(value: object) -> bytes:
    """``value`` as bytes.

    Raises:
        ConfigurationError: for an object of any other kind; names where it is.
    """
    arrays: list[Array] = []
    structure = json.dumps(_to_json(value, arrays, "the object")).encode()
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


def broadcast_object(transport: Transport, value: object, root: int = 0) -> Any:
    """The root's ``value`` on every rank; what the others pass is ignored.

    Raises:
        ConfigurationError: on every rank, if the root's value cannot be encoded.
    """
    payload, failed = _encode_or_say_why_not(value) if transport.rank == root else (b"", False)
    header = np.array([len(payload), failed], np.int64)
    transport.broadcast(header, root)
    buffer = np.empty(int(header[0]), np.uint8)
    if transport.rank == root:
        buffer[...] = np.frombuffer(payload, np.uint8)
    transport.broadcast(buffer, root)
    if header[1]:
        raise ConfigurationError(f"on rank {root}: {buffer.tobytes().decode()}")
    return decode(buffer.tobytes())


def allgather_object(transport: Transport, value: object) -> list[Any]:
    """Every rank's ``value``, by rank.

    Raises:
        ConfigurationError: on every rank, if the value of one of them cannot be encoded.
    """
    payload, failed = _encode_or_say_why_not(value)
    headers = transport.allgather(np.array([len(payload), failed], np.int64))
    padded = np.zeros(int(headers[:, 0].max()), np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    gathered = transport.allgather(padded)
    texts = [gathered[rank, :length].tobytes() for rank, length in enumerate(headers[:, 0])]
    if headers[:, 1].any():
        rank = int(headers[:, 1].argmax())
        raise ConfigurationError(f"on rank {rank}: {texts[rank].decode()}")
    return [decode(text) for text in texts]


def _encode_or_say_why_not(value: object) -> tuple[bytes, bool]:
    """The error travels in place of the value, so that nobody waits for a value that never comes."""
    try:
        return encode(value), False
    except ConfigurationError as error:
        return str(error).encode(), True


def _to_json(value: Any, arrays: list[Array], where: str) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return {"float": str(float(value))}  # JSON knows no NaN and no infinity
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_to_json(item, arrays, f"{where}[{number}]") for number, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict):
        pairs = [
            [_to_json(key, arrays, f"a key of {where}"), _to_json(item, arrays, f"{where}[{key!r}]")]
            for key, item in value.items()
        ]
        return {"dict": pairs}
    if isinstance(value, np.ndarray | np.generic) and (value.dtype.kind in "biuf" or value.dtype == bfloat16):
        arrays.append(np.asarray(value))
        return {"array" if isinstance(value, np.ndarray) else "scalar": [value.dtype.name, list(value.shape)]}
    raise ConfigurationError(
        f"{where} is a {type(value).__name__}: only None, bool, int, float, str, list, tuple, dict and arrays of "
        "numbers travel between ranks (no pickle: it could run anything)"
    )


def _from_json(value: Any, take: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "array":
        return take(*content)
    if kind == "scalar":
        return take(*content)[()]
    if kind == "dict":
        return {_from_json(key, take): _from_json(item, take) for key, item in content}
    items = [_from_json(item, take) for item in content]
    return tuple(items) if kind == "tuple" else items
