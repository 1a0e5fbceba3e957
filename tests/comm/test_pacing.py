"""How a thread waits for other ranks."""

from types import SimpleNamespace

import pytest

from lentando.comm.asynchronous import pacing
from lentando.comm.asynchronous.pacing import Pace


@pytest.mark.parametrize("is_executing", [False, True])
def test_where_ranks_share_cores_a_thread_soon_sleeps(is_executing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test: a busy machine may run this one long after it was to wake up."""
    seconds = 0.0
    monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic=lambda: seconds))
    pauses = {}
    for is_crowded in (False, True):
        pace = Pace(is_crowded=is_crowded)
        assert pace.pause_seconds(is_urgent=True, is_executing=is_executing) == 0
        seconds += 3e-3
        pauses[is_crowded] = pace.pause_seconds(is_urgent=True, is_executing=is_executing)
    assert 0 < pauses[True] < 1e-4
    assert pauses[False] == 0 if is_executing else pauses[True] < pauses[False]


def test_a_thread_does_not_spin_while_the_program_computes() -> None:
    assert Pace(is_crowded=True).pause_seconds(is_urgent=False) == Pace().pause_seconds(is_urgent=False) > 0
