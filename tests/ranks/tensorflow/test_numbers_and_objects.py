"""Python numbers, boolean tensors, and objects of rare kinds."""

from collections import Counter, OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import lentando.tensorflow as lt

Point = namedtuple("Point", "a b")


@pytest.mark.parametrize("in_graph", [False, True])
def test_numbers_and_booleans_are_combined(in_graph: bool) -> None:
    def combine() -> Any:
        own = tf.constant([True, False, lt.rank() == 0])
        return lt.allreduce(1.5), lt.allreduce(lt.rank()), lt.allreduce(own, op=lt.Max), lt.allreduce(own, op=lt.Min)

    number, mean, any_of, all_of = (tf.function(combine) if in_graph else combine)()
    assert float(number) == 1.5
    assert float(mean) == (lt.size() - 1) / 2
    assert any_of.numpy().tolist() == [True, False, True]
    assert all_of.numpy().tolist() == [True, False, lt.size() == 1]


@pytest.mark.parametrize("value", [b"raw", {1, "a"}, Path("runs"), OrderedDict(b=[1], a=2), Counter("aab")])
def test_objects_keep_their_kind(value: Any) -> None:
    for found in (lt.broadcast_object(value), *lt.allgather_object(value)):
        assert type(found) is type(value)
        assert found == value


def test_tensors_of_rare_dtypes_travel() -> None:
    for dtype in (tf.dtypes.experimental.float8_e5m2, tf.complex64, tf.bfloat16):
        tensor = tf.cast(tf.constant([1.0, -2.0]), dtype)
        found = lt.broadcast_object([tensor])[0]
        assert found.dtype == dtype
        assert tf.cast(found, tf.complex64).numpy().tolist() == [1, -2]


def test_what_does_not_travel_is_refused_on_every_rank_with_its_place() -> None:
    value = {"at": [Point(1, 2)]} if lt.rank() == 0 else None
    for call in (lt.broadcast_object, lt.allgather_object):
        with pytest.raises(lt.ConfigurationError, match=r"on rank 0: the object\['at'\]\[0\] is a namedtuple Point"):
            call(value)
