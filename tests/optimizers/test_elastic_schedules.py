"""Ranks that die by thousands of schedules, in simulated jobs of every method: those that are left come to the end."""

from typing import Any

import pytest
from case_selection import selected_cases
from elastic_schedules import Schedule, failures

from lentando.comm.survivors import Survivors
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.push_sum import PushSum

SEEDS, CHUNK = selected_cases(1000, 2000), 250


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_those_that_are_left_come_to_the_end_with_the_right_averages(first: int) -> None:
    broken = failures(first, CHUNK)
    assert not broken, "\n".join(broken)


@pytest.mark.slow
def test_schedules_differ_and_cover_much() -> None:
    drawn = [Schedule.draw(seed) for seed in range(SEEDS)]
    assert len(set(drawn)) == SEEDS
    for names in ({schedule.method for schedule in drawn}, {schedule.size for schedule in drawn}):
        assert len(names) >= 5
    assert drawn == [Schedule.draw(seed) for seed in range(SEEDS)]


# What looks for broken promises must find them.


def keeps_the_weight(self: Any, begun: int, furthest: int) -> None:
    weight = self.weight
    resume_after_failure(self, begun, furthest)
    self.weight = 0.5 * weight


def votes_yes_whatever_happened(self: Any, transport: Any, attempt: Any, undo: Any = None) -> Any:
    vote, transport.vote = transport.vote, lambda yes: vote(True)
    try:
        return transaction(self, transport, attempt, undo)
    finally:
        transport.vote = vote


def forgets_where_others_are(self: Any, begun: int, furthest: int) -> None:
    resume_after_failure(self, begun, begun)


resume_after_failure, transaction = PushSum.resume_after_failure, Survivors.transaction


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "corrupted"),
    [
        (PushSum, "resume_after_failure", keeps_the_weight),
        (PushSum, "resume_after_failure", forgets_where_others_are),
        (OuterStep, "replan", lambda self: None),
        (Survivors, "transaction", votes_yes_whatever_happened),
    ],
)
def test_a_broken_promise_is_found(owner: Any, name: str, corrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, corrupted)
    broken = failures(0, 150)
    assert broken
    assert all("again: python tests/support/elastic_schedules.py --seed" in text for text in broken)
