"""The timeline: valid at any time, complete, with the clocks of the ranks aligned."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lentando.comm import operations, timeline
from lentando.comm.capabilities import Background
from lentando.comm.operations import Sum
from lentando.comm.transport import Transport


@pytest.fixture
def path(shared_path: Path) -> Iterator[Path]:
    yield shared_path / "timeline.json"
    operations.stop_timeline()
    operations.barrier()


def events(path: Path, rank: int) -> list[dict[str, Any]]:
    own = path if rank == 0 else path.with_name(f"timeline.rank{rank}.json")
    found: list[dict[str, Any]] = json.loads(own.read_text())
    return found


def named(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in found if event["name"] == name]


def test_collectives_are_recorded_by_name_with_bytes(transport: Transport, path: Path) -> None:
    operations.start_timeline(path, mark_cycles=True)
    operations.allreduce(np.ones(3, np.float32), Sum, "loss")
    handles = [operations.allreduce_call(np.ones(5), Sum, name=f"gradient {number}").start() for number in range(4)]
    for handle in handles:
        handle.wait()
    operations.allgather_call(np.ones(5), name="all").start().wait()
    has_thread = transport.size > 1 and isinstance(transport, Background)  # or the thread that waits executes them
    while not named(found := events(path, transport.rank), "ALLGATHER" if has_thread else "CYCLE_START"):
        time.sleep(timeline.WRITE_SECONDS)  # while it is being recorded
    assert named(found, "CYCLE_START")
    blocking, *together = named(found, "ALLREDUCE")
    assert blocking["args"] == {"tensor": "allreduce.loss", "bytes": 12}
    (negotiation,) = [event for event in named(found, "NEGOTIATE_ALLREDUCE") if event["ph"] == "X"]
    assert blocking["ts"] <= negotiation["ts"]
    assert negotiation["ts"] + negotiation["dur"] <= blocking["ts"] + blocking["dur"]
    if has_thread:
        tensors = [name for event in together for name in event["args"]["tensors"]]
        assert sorted(tensors) == [f"allreduce.gradient {number}" for number in range(4)]
        assert sum(event["args"]["bytes"] for event in together) == 160
        begun, ended = ([e["id"] for e in named(found, "NEGOTIATE_ALLREDUCE") if e["ph"] == phase] for phase in "be")
        assert sorted(begun) == sorted(ended) == sorted(tensors)
        assert [event["args"]["tensor"] for event in named(found, "ALLGATHER")] == ["allgather.all"]
    operations.stop_timeline()
    assert events(path, transport.rank)[: len(found)] == found
    operations.allreduce(np.ones(1), Sum, "later")
    assert "later" not in str(events(path, transport.rank))


def test_clocks_of_all_ranks_are_that_of_rank_0(transport: Transport, path: Path, monkeypatch: Any) -> None:
    moved = time.perf_counter
    ahead = 100.0 * transport.rank
    monkeypatch.setattr(time, "perf_counter", lambda: moved() + ahead)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: int((moved() + ahead) * 1e9))
    operations.start_timeline(path)
    for _ in range(5):
        operations.barrier()
    operations.stop_timeline()
    monkeypatch.undo()
    by_rank = operations.allgather_object([[e["ts"], e["dur"]] for e in named(events(path, transport.rank), "BARRIER")])
    (process,) = named(events(path, transport.rank), "process_name")
    if transport.size == 1:
        return
    offset, uncertainty = (process["args"][f"clock_{what}_in_micros"] for what in ("offset", "uncertainty"))
    assert abs(offset + ahead * 1e6) <= uncertainty + 1
    assert 0 <= uncertainty < 0.1e6
    assert (
        abs(process["args"]["start_time_since_epoch_in_micros"] + by_rank[transport.rank][0][0] - time.time() * 1e6)
        < 60e6
    )
    for barrier in zip(*by_rank, strict=True):  # all ranks are inside it at some moment
        assert max(ts for ts, _ in barrier) <= min(ts + duration for ts, duration in barrier) + 2 * 0.1e6


def test_a_second_start_replaces_the_recording(transport: Transport, path: Path) -> None:
    operations.start_timeline(path)
    operations.allreduce(np.ones(1), Sum, "first")
    operations.start_timeline(path)
    operations.allreduce(np.ones(1), Sum, "second")
    operations.stop_timeline()
    text = str(events(path, transport.rank))
    assert "allreduce.second" in text
    assert "first" not in text


def test_an_event_that_a_thread_is_about_to_add_while_others_are_written_is_kept(
    transport: Transport, path: Path
) -> None:
    operations.start_timeline(path)
    recording = timeline.active
    assert recording is not None
    add = recording._events.append  # so far has the thread come
    operations.barrier()
    with recording._writing:
        recording._write()
    add({"name": "late", "ph": "i", "ts": 0.0})
    operations.stop_timeline()
    assert named(events(path, transport.rank), "late")


def test_without_a_recording_nothing_is_wrapped() -> None:
    def function() -> None:
        return

    assert timeline.active is None
    assert timeline.recorded("anything", function) is function
