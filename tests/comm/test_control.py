"""What ranks learn from each other's control messages, and the error that all of them get when they disagree."""

import math

import pytest

from lentando.comm.control import Agreement, Control, Event, agree, fingerprint
from lentando.comm.errors import MismatchError
from lentando.comm.testing import ThreadTransport, run_ranks


def agreed(*controls: Control) -> Agreement:
    """What all ranks know when each of them sends one of these."""

    def run(transport: ThreadTransport) -> Agreement:
        return agree(transport, controls[transport.rank], lambda: pytest.fail("the ranks agree"))

    first, *others = run_ranks(len(controls), run)
    assert all(repr(other) == repr(first) for other in others)  # repr, because NaN differs from itself
    return first


def disagreement(*controls: Control) -> str:
    """The message that all ranks get when each of them sends one of these."""

    def run(transport: ThreadTransport) -> str:
        with pytest.raises(MismatchError) as error:
            agree(transport, controls[transport.rank], lambda: f"does number {transport.rank % 2}")
        return str(error.value)

    (message,) = set(run_ranks(len(controls), run))
    return message


def test_loss_is_the_mean_over_the_ranks_that_have_one() -> None:
    losses = [1.0, math.nan, 4.0]
    assert agreed(*(Control(Event.ROUND, loss=loss) for loss in losses)).loss == 2.5


def test_loss_is_nan_when_no_rank_has_one() -> None:
    assert math.isnan(agreed(Control(Event.ROUND), Control(Event.ROUND)).loss)


def test_infinite_loss_of_one_rank_is_not_hidden() -> None:
    assert agreed(Control(Event.ROUND, loss=math.inf), Control(Event.ROUND, loss=1.0)).loss == math.inf


def test_weight_is_the_sum_over_ranks() -> None:
    assert agreed(*(Control(Event.ROUND, weight=weight) for weight in (1.0, 0.5, 0.0))).weight == 1.5


def test_learning_rate_is_the_mean_over_ranks() -> None:
    assert agreed(*(Control(Event.ROUND, learning_rate=rate) for rate in (0.5, 0.25, 0.0))).learning_rate == 0.25


def test_flags_are_told_by_rank() -> None:
    assert agreed(*(Control(Event.ROUND, flag=flag) for flag in (False, True, False, True))).flagged == [1, 3]


def test_ranks_with_values_that_are_not_finite_and_those_told_to_stop_are_told_by_rank() -> None:
    controls = [Control(Event.ROUND, loss=1.0, finite=False), Control(Event.ROUND, stopping=True), Control(Event.ROUND)]
    found = agreed(*controls)
    assert found.non_finite == [0]
    assert found.stopping == [1]
    assert found.losses[0] == 1.0
    assert math.isnan(found.losses[1])


def test_clock_is_that_of_rank_0() -> None:
    assert agreed(Control(Event.ROUND, clock=10.25), Control(Event.ROUND, clock=99.0)).clock == 10.25


def test_largest_fingerprint_travels_exactly() -> None:
    largest = 2**48 - 1
    agreed(Control(Event.CONSTRUCT, subject=largest), Control(Event.CONSTRUCT, subject=largest))
    disagreement(Control(Event.CONSTRUCT, subject=largest), Control(Event.CONSTRUCT, subject=largest - 1))


@pytest.mark.parametrize(
    "odd",
    [
        Control(Event.SHUTDOWN),
        Control(Event.ROUND, round=1),
        Control(Event.ROUND, step=1),
        Control(Event.ROUND, subject=1),
    ],
)
def test_difference_on_one_rank_is_an_error_on_all(odd: Control) -> None:
    usual = Control(Event.ROUND)
    message = disagreement(usual, odd, usual)
    assert message.startswith("the ranks are not about to do the same thing.")


def test_error_names_the_ranks_and_what_each_does() -> None:
    message = disagreement(*(Control(Event.ROUND, step=rank % 2) for rank in range(5)))
    assert "ranks 0, 2 and 4: does number 0; ranks 1 and 3: does number 1" in message


def test_agreement_costs_one_collective() -> None:
    def collectives(transport: ThreadTransport) -> int:
        agree(transport, Control(Event.ROUND), lambda: "")
        return transport.traffic.collectives

    assert run_ranks(2, collectives) == [1, 1]


def test_fingerprint_tells_descriptions_apart() -> None:
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
        run_ranks(2, lambda transport, event=event: agree(transport, Control(event), str))
