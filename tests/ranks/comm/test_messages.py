"""Objects and control messages between real processes."""

import math

import numpy as np
import pytest

from lentando.comm.agreement import Event, Intent, agree, ranks_where
from lentando.comm.errors import ConfigurationError, MismatchError, ranks_in_words
from lentando.comm.objects import allgather_object, broadcast_object
from lentando.comm.transport import Transport


def test_object_of_every_root_arrives_on_every_rank(transport: Transport) -> None:
    for root in range(transport.size):
        value = {"root": transport.rank, "weights": np.arange(3, dtype=np.float16), "nested": [(1, None), math.inf]}
        found = broadcast_object(transport, value if transport.rank == root else None, root)
        assert found["root"] == root
        assert found["weights"].dtype == np.float16
        assert found["weights"].tolist() == [0, 1, 2]
        assert found["nested"] == [(1, None), math.inf]


def test_objects_of_different_length_are_gathered_by_rank(transport: Transport) -> None:
    assert allgather_object(transport, "x" * transport.rank) == ["x" * rank for rank in range(transport.size)]


def test_object_that_cannot_travel_is_an_error_on_every_rank(transport: Transport) -> None:
    root = transport.size - 1
    with pytest.raises(ConfigurationError, match=f"on rank {root}: the object is a type"):
        broadcast_object(transport, int, root)
    with pytest.raises(ConfigurationError, match=f"on rank {root}: the object is a type"):
        allgather_object(transport, int if transport.rank == root else 1)


def test_all_ranks_learn_the_same(transport: Transport) -> None:
    mine = {"loss": float(transport.rank), "weight": 0.5, "has_ended": transport.rank == 0}
    by_rank = agree(transport, Intent(Event.ROUND), lambda: pytest.fail("the ranks agree"), mine)
    assert by_rank["loss"].tolist() == list(range(transport.size))
    assert by_rank["weight"].tolist() == [0.5] * transport.size
    assert ranks_where(by_rank["has_ended"]) == [0]


def test_rank_that_does_something_else_is_named_on_every_rank(transport: Transport) -> None:
    if transport.size == 1:
        pytest.skip("a world of one cannot disagree")
    odd = transport.size - 1
    step, words = (1, "steps") if transport.rank == odd else (0, "waits")
    with pytest.raises(MismatchError, match=f"{ranks_in_words(range(odd))}: waits; rank {odd}: steps"):
        agree(transport, Intent(Event.ROUND, step=step), lambda: words)


def test_disagreement_leaves_the_transport_usable(transport: Transport) -> None:
    if transport.size > 1:
        with pytest.raises(MismatchError):
            agree(transport, Intent(Event.ROUND, round=transport.rank), lambda: "another round")
    assert allgather_object(transport, transport.rank) == list(range(transport.size))
