"""The numbers that ranks receive with a control message, and the error that all of them get when they disagree."""

import math

import numpy as np
import pytest

from lentando.comm.agreement import COLUMNS, Event, Intent, agree, fingerprint, ranks_where
from lentando.comm.errors import MismatchError
from lentando.comm.testing import ThreadTransport, run_ranks

ROUND = Intent(Event.ROUND)


def received(*numbers: dict[str, float], intent: Intent = ROUND) -> dict[str, list[float]]:
    """What all ranks receive when each of them attaches some of these numbers to the same intent."""

    def run(transport: ThreadTransport) -> dict[str, list[float]]:
        by_rank = agree(transport, intent, lambda: pytest.fail("the ranks agree"), numbers[transport.rank])
        return {name: values.tolist() for name, values in by_rank.items()}

    first, *others = run_ranks(len(numbers), run)
    assert all(repr(other) == repr(first) for other in others)  # repr, because NaN differs from itself
    return first


def disagreement(*intents: Intent) -> str:
    """The message that all ranks get when each of them has one of these intents."""

    def run(transport: ThreadTransport) -> str:
        with pytest.raises(MismatchError) as error:
            agree(transport, intents[transport.rank], lambda: f"does number {transport.rank % 2}")
        return str(error.value)

    (message,) = set(run_ranks(len(intents), run))
    return message


def test_numbers_arrive_by_rank_and_name() -> None:
    own = [{"loss": 1.0, "rate": 0.5}, {"loss": math.inf, "rate": 0.25}, {"loss": 4.0, "rate": 1e-300}]
    assert received(*own) == {"loss": [1.0, math.inf, 4.0], "rate": [0.5, 0.25, 1e-300]}


def test_nan_arrives_as_nan() -> None:
    loss = received({"loss": math.nan}, {"loss": 2.0})["loss"]
    assert math.isnan(loss[0])
    assert loss[1] == 2.0


def test_truth_values_arrive_as_numbers_that_name_their_ranks() -> None:
    flags = received(*({"flag": flag} for flag in (False, True, False, True)))["flag"]
    assert ranks_where(np.array(flags)) == [1, 3]


def test_message_without_numbers_is_empty() -> None:
    assert received({}, {}) == {}


def test_as_many_numbers_as_a_message_holds_arrive() -> None:
    own = {f"number {column}": float(column) for column in range(COLUMNS)}
    assert received(own, own) == {name: [number, number] for name, number in own.items()}


def test_more_numbers_than_a_message_holds_are_refused_before_anything_is_sent() -> None:
    def run(transport: ThreadTransport) -> int:
        with pytest.raises(ValueError, match=f"at most {COLUMNS} numbers, got {COLUMNS + 1}: 0, 1, 2"):
            agree(transport, Intent(Event.ROUND), str, {str(column): 0.0 for column in range(COLUMNS + 1)})
        return transport.traffic.collectives

    assert run_ranks(2, run) == [0, 0]


def test_ranks_that_attach_different_numbers_to_different_intents_get_an_error_on_all() -> None:
    def run(transport: ThreadTransport) -> None:
        own = {"loss": 1.0, "rate": 0.5} if transport.rank else {"flag": 1.0}
        with pytest.raises(MismatchError, match="the ranks are not about to do the same thing"):
            agree(transport, Intent(Event.ROUND if transport.rank else Event.SHUTDOWN), lambda: "does it", own)

    run_ranks(3, run)


def test_largest_fingerprint_travels_exactly() -> None:
    largest = 2**48 - 1
    received({}, {}, intent=Intent(Event.CONSTRUCT, subject=largest))
    disagreement(Intent(Event.CONSTRUCT, subject=largest), Intent(Event.CONSTRUCT, subject=largest - 1))


@pytest.mark.parametrize(
    "odd",
    [
        Intent(Event.SHUTDOWN),
        Intent(Event.ROUND, round=1),
        Intent(Event.ROUND, step=1),
        Intent(Event.ROUND, subject=1),
    ],
)
def test_difference_on_one_rank_is_an_error_on_all(odd: Intent) -> None:
    usual = Intent(Event.ROUND)
    message = disagreement(usual, odd, usual)
    assert message.startswith("the ranks are not about to do the same thing.")


def test_error_names_the_ranks_and_what_each_does() -> None:
    message = disagreement(*(Intent(Event.ROUND, step=rank % 2) for rank in range(5)))
    assert "ranks 0, 2 and 4: does number 0; ranks 1 and 3: does number 1" in message


def test_agreement_costs_one_collective() -> None:
    def collectives(transport: ThreadTransport) -> int:
        agree(transport, Intent(Event.ROUND), lambda: "")
        return transport.traffic.collectives

    assert run_ranks(2, collectives) == [1, 1]


def test_fingerprint_distinguishes_descriptions() -> None:
    described = [
        [["weight", [3, 4], "float32", 0]],
        [["weight", [4, 3], "float32", 0]],
        [["weight", [3, 4], "float64", 0]],
    ]
    assert len({fingerprint(one) for one in described}) == 3


def test_fingerprint_ignores_the_order_of_keys() -> None:
    assert fingerprint({"period": 12, "slow_lr": 1.0}) == fingerprint({"slow_lr": 1.0, "period": 12})


def test_fingerprint_is_the_same_in_every_process() -> None:
    assert fingerprint(["period", 12]) == 225483604222625


def test_every_wait_has_words() -> None:
    for event in Event:
        run_ranks(2, lambda transport, event=event: agree(transport, Intent(event), str))
