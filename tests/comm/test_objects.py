"""Objects keep their kinds on the way, nothing but data travels, and what cannot travel is refused on every rank."""

import json
import math
from collections import Counter, OrderedDict, defaultdict
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.objects import allgather_object, broadcast_object, decode, encode
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Array


class Point(NamedTuple):
    x: int
    y: int


class Weekday(IntEnum):
    MONDAY = 0


class Scheduler:
    """An object that is saved by its state dict, as those of frameworks are."""

    def state_dict(self) -> dict[str, int]:
        return {}


class Names(dict[str, int]):
    """A dict of a user's own."""


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = plain | st.tuples(plain, plain)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(keys, inner),
    max_leaves=20,
)


def alike(found: Any, expected: Any) -> bool:
    """Equal, and of the same kind all the way down: 1, 1.0 and True are three things."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, dict):
        return alike(list(found.items()), list(expected.items()))
    return bool(found == expected)


@pytest.mark.slow
@given(nested)
def test_decoding_gives_back_what_was_encoded(value: object) -> None:
    assert alike(decode(encode(value)), value)


@pytest.mark.parametrize(
    "value", [[1], (1,), [(1, [2]), {}], (), {"a": {1: (2.5, None)}}, {(1, "b"): 2, None: 3, 2.5: 4}, {"list": [1]}]
)
def test_kinds_of_containers_and_keys_survive(value: object) -> None:
    assert alike(decode(encode(value)), value)


def test_floats_that_json_does_not_know_survive() -> None:
    nan, infinity, negative_zero = decode(encode([math.nan, -math.inf, -0.0]))
    assert math.isnan(nan)
    assert infinity == -math.inf
    assert math.copysign(1, negative_zero) == -1


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, bfloat16, np.int64, np.uint8, np.bool_, ">f4"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (), (0, 3)])
def test_arrays_keep_dtype_shape_and_values(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    found = decode(encode({"weights": array}))["weights"]
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.shape == shape
    assert np.array_equal(found, array)


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3).T, np.arange(6)[::2]])
def test_arrays_that_are_not_contiguous_keep_their_values(array: Array) -> None:
    assert np.array_equal(decode(encode(array)), array)


def test_several_arrays_stay_apart() -> None:
    first, second = decode(encode([np.arange(3), np.array([2.5])]))
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [2.5]


def test_decoded_arrays_are_writable() -> None:
    found = decode(encode(np.zeros(2)))
    found[0] = 1
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize("scalar", [np.float32(2.5), np.int64(3), np.bool_(True), bfloat16(1.5)])
def test_scalars_of_numpy_stay_scalars_even_as_keys(scalar: np.generic) -> None:
    assert alike(decode(encode({scalar: scalar})), {scalar: scalar})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, {"a": object()}], r"the object\[1\]\['a'\] is a object"),
        ([Scheduler()], r"the object\[0\] is a Scheduler, which cannot be sent: send its state_dict\(\)"),
        ({"f": [print]}, r"the object\['f'\]\[0\] is a builtin_function_or_method"),
        ({object: 1}, "a key of the object is a type"),
        (Point(1, 2), r"the object is a namedtuple Point, .* send tuple\(value\), or value._asdict\(\)"),
        ({"at": [Point(1, 2)]}, r"the object\['at'\]\[0\] is a namedtuple Point"),
        ({"day": {Weekday.MONDAY}}, r"the object\['day'\]\{...\} is a member of the enumeration Weekday"),
        ([Names()], r"the object\[0\] is a Names, which would be decoded as a dict: send dict\(value\)"),
        ({"d": defaultdict(lambda: 0)}, r"the object\['d'\] is a defaultdict of <function"),
        (np.array(["2026-11-27"], "datetime64[D]"), r"the object is a ndarray of dtype datetime64\[D\]: only"),
        ({"t": np.array(["text"])}, r"the object\['t'\] is a ndarray of dtype <U4: only"),
        (np.array([print]), "the object is a ndarray of dtype object: only"),
        ([np.zeros(2, "f4, i4")], r"the object\[0\] is a ndarray of dtype \[\('f0', '<f4'\), \('f1', '<i4'\)\]: only"),
        ([np.datetime64("2026-11-27")], r"the object\[0\] is a datetime64 of dtype datetime64\[D\]: only"),
    ],
)
def test_other_kinds_are_refused_with_their_place(value: object, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        encode(value)


class RunsCodeWhenUnpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code from the network was run",))


def test_an_object_that_would_run_code_does_not_travel() -> None:
    with pytest.raises(ConfigurationError, match="RunsCodeWhenUnpickled: only None, bool"):
        encode(RunsCodeWhenUnpickled())


@pytest.mark.parametrize("dtype", ["object", "O", "V8,O"])
def test_decoding_makes_no_objects_from_bytes(dtype: str) -> None:
    structure = json.dumps({"array": [dtype, [1]]}).encode()
    with pytest.raises((TypeError, ValueError)):
        decode(len(structure).to_bytes(8, "little") + structure + b"\1" * 64)


@pytest.mark.parametrize("root", [0, 2])
def test_broadcast_object_gives_the_roots_to_every_rank(root: int) -> None:
    def receive(transport: ThreadTransport) -> Any:
        return broadcast_object(transport, {"rank": transport.rank}, root)

    assert run_ranks(3, receive) == [{"rank": root}] * 3


def test_broadcast_object_takes_whatever_the_others_pass() -> None:
    assert run_ranks(2, lambda rank: broadcast_object(rank, object() if rank.rank else 5)) == [5, 5]


def test_allgather_object_gives_objects_of_different_length_by_rank() -> None:
    texts = [[], ["x"], ["x", "x"]]
    assert run_ranks(3, lambda rank: allgather_object(rank, ["x"] * rank.rank)) == [texts] * 3


@pytest.mark.parametrize("collective", [broadcast_object, allgather_object])
def test_object_that_cannot_travel_is_an_error_on_every_rank(collective: Any) -> None:
    def message(transport: ThreadTransport) -> str:
        with pytest.raises(ConfigurationError) as error:
            collective(transport, [int] if transport.rank == 0 else 5)
        return str(error.value)

    (words,) = set(run_ranks(3, message))
    assert words.startswith("on rank 0: the object[0] is a type: only None")


@pytest.mark.parametrize("collective", [broadcast_object, allgather_object])
def test_object_that_cannot_be_made_plain_is_an_error_on_every_rank(collective: Any) -> None:
    def plain(value: Any) -> Any:
        raise ConfigurationError(f"{value} is no number")

    def message(transport: ThreadTransport) -> str:
        with pytest.raises(ConfigurationError) as error:
            collective(transport, "this", plain=plain if transport.rank == 0 else None)
        return str(error.value)

    assert run_ranks(3, message) == ["on rank 0: this is no number"] * 3


@pytest.mark.parametrize(
    "value",
    [
        b"\0raw\xff",
        bytearray(b"raw"),
        {1, "a", (2, None)},
        {frozenset({1}): frozenset()},
        [Path("runs/first"), Path()],
        3 - 4j,
        {1j: [complex(math.inf, -0.0)]},
        OrderedDict(b=1, a=[2]),
        {"n": Counter("abca")},
        defaultdict(list, {"a": [1, (2,)]}),
        defaultdict(None, {1: defaultdict(int, {2: 3})}),
    ],
)
def test_other_kinds_of_values_and_containers_keep_their_kind(value: Any) -> None:
    found = decode(encode(value))
    assert type(found) is type(value)
    assert repr(found) == repr(value) or (isinstance(value, set) and found == value)
    if isinstance(value, defaultdict):
        assert found.default_factory is value.default_factory


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "complex64", "complex128"])
def test_arrays_of_rare_dtypes_travel(name: str) -> None:
    array = np.array([[1, -2.5], [0, 0.125]]).astype(name)
    found = decode(encode({"a": array}))["a"]
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def holding_itself() -> Any:
    value: list[Any] = [1]
    value.append({"again": value})
    return value


def deep() -> Any:
    value: Any = 0
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (holding_itself(), r"the object\[1\]\['again'\] contains itself"),
        (deep(), r"the object(\[0\])*\[?0?\.\.\. is inside 100 other containers"),
        ([10**5000], "the object cannot be sent: Exceeds the limit"),
    ],
)
def test_objects_without_end_are_refused_on_every_rank(value: Any, reason: str) -> None:
    def message(transport: ThreadTransport) -> str:
        with pytest.raises(ConfigurationError, match=reason) as error:
            broadcast_object(transport, value)
        return str(error.value)

    assert len(set(run_ranks(2, message))) == 1


def test_the_same_container_twice_is_no_cycle() -> None:
    shared = [1]
    assert decode(encode([shared, {"a": shared}])) == [[1], {"a": [1]}]
