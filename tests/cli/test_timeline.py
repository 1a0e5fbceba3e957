"""``lentando timeline`` on real traces, and the times that it derives from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import mpirun

from lentando.cli.app import run
from lentando.cli.timeline.traces import Span, Trace
from lentando.cli.timeline.waiting import judge, meetings, times_of

PROGRAM = str(Path(__file__).parents[1] / "support" / "slow_rank.py")


def trace(rank: int, *spans: tuple[str, float, float]) -> Trace:
    """A trace with outer steps: subject, beginning and end in microseconds."""
    return Trace(rank, [], [Span("OUTER_STEP", subject, began, ended, {}) for subject, began, ended in spans], 1.0)


def test_times_are_divided_into_computing_waiting_and_communicating() -> None:
    traces = [
        trace(0, ("4", 0, 10), ("8", 100, 160)),  # computes 90, waits 50, communicates 10
        trace(1, ("4", 0, 10), ("8", 150, 160)),  # computes 140, communicates 10
        trace(2, ("4", 0, 10), ("8", 110, 165), ("12", 200, 300)),  # the last one is no communication of all
    ]
    met = meetings(traces)
    assert [meeting.last for meeting in met] == [0, 1]
    first, second, third = times_of(traces, met)
    assert (first.computing, first.waiting, first.communicating, first.awaited) == (90, 50, 10, 0)
    assert (second.computing, second.waiting, second.communicating, second.awaited) == (140, 0, 10, 90)
    assert (third.computing, third.waiting, third.communicating, third.last) == (100, 40, 15, 0)


@pytest.mark.parametrize(
    ("second", "rank", "cause"),
    [
        ([(100, 101)] * 4, None, None),
        ([(100, 310)] * 3 + [(300, 310)], 3, "compute"),
        ([(100, 110)] * 3 + [(100, 200)], 3, "network"),
        ([(100, 150)] * 4, None, "network"),
    ],
)
def test_the_verdict_names_the_rank_and_the_cause(
    second: list[tuple[float, float]], rank: int | None, cause: str | None
) -> None:
    """Each rank reaches the second outer step at one time and leaves it at another; the first one ends at 0."""
    traces = [trace(number, ("4", -1, 0), ("8", *span)) for number, span in enumerate(second)]
    verdict = judge(times_of(traces, meetings(traces)))
    assert (verdict.rank, verdict.cause) == (rank, cause)


@pytest.mark.parametrize(
    ("links_us", "rank"),
    [
        ([9_000, 9_100, 85_000, 84_000], 2),  # slow in both directions: what rank 2 receives, and what it sends
        ([85_000, 9_100, 9_000, 84_000], 3),
        ([9_000, 9_100, 85_000, 9_200], 2),
        ([9_000, 9_100, 9_500, 10_000], None),
        ([None, 90_000, None, 9_000], None),
        ([], None),
    ],
)
def test_a_slow_link_is_named(links_us: list[float | None], rank: int | None) -> None:
    traces = [trace(number, ("4", -1, 0), ("8", 100, 150)) for number in range(4)]
    verdict = judge(times_of(traces, meetings(traces)), links_us)
    assert (verdict.rank, verdict.cause) == (rank, "network")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Timelines of a job of four ranks, of which rank 2 is slow."""
    folder: Path = tmp_path_factory.mktemp("timeline")
    job = mpirun(4, PROGRAM, "2", environment={"LENTANDO_TIMELINE": str(folder)})
    assert job.status == 0, job.output
    return folder


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run(["timeline", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_rank_that_computes_three_times_as_long_is_named(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, str(recorded))
    assert found["communications"] == 8
    assert (found["verdict"]["rank"], found["verdict"]["cause"]) == (2, "compute")
    slow, *others = sorted(found["microseconds_by_rank"], key=lambda own: -own["computing"])
    assert slow["last"] == 7
    assert all(1.5 < slow["computing"] / own["computing"] < 4 for own in others)  # 3 on an idle machine
    assert all(own["waiting"] > own["computing"] / 2 for own in others)


def test_the_merged_trace_holds_all_events_and_arrows_from_the_last_rank(
    recorded: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = report(capsys, str(recorded), "--output", str(recorded / "all.json"))
    assert report(capsys, str(recorded), "--output", str(tmp_path / "all.json")) == found  # without what was merged
    merged = json.loads((tmp_path / "all.json").read_text())
    single = [json.loads(file.read_text()) for file in recorded.glob("timeline*.json")]
    assert len(single) == 4
    assert all(event in merged for events in single for event in events)
    begins = {event["id"]: event for event in merged if event["ph"] == "s"}
    ends = {event["id"]: event for event in merged if event["ph"] == "f"}
    assert begins.keys() == ends.keys()
    assert len(begins) >= 7 * 3
    assert sum(event["pid"] == 2 for event in begins.values()) >= 7 * 3
    assert {event["pid"] for event in ends.values()} >= {0, 1, 3}


def test_the_table_names_all_ranks(recorded: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["timeline", str(recorded), "--output", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    assert "The ranks wait for rank 2, which computes" in printed
    assert [line.split()[0] for line in printed.splitlines()[2:6]] == ["0", "1", "2", "3"]


def test_a_folder_without_timelines_or_with_other_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["timeline", str(tmp_path)]) == 2
    assert "contains no timeline" in capsys.readouterr().err
    (tmp_path / "timeline.json").write_text("[1, 2]")
    assert run(["timeline", str(tmp_path)]) == 2
    assert "is no timeline of a rank" in capsys.readouterr().err


def test_a_missing_rank_is_refused(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 2):
        name = f"timeline.rank{rank}.json" if rank else "timeline.json"
        (tmp_path / name).write_text((recorded / name).read_text())
    assert run(["timeline", str(tmp_path)]) == 2
    assert "timelines of ranks [0, 2]" in capsys.readouterr().err


def test_one_rank_alone_has_nothing_to_compare_as_often_as_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged trace of the first call is not taken for that of a second rank."""
    job = mpirun(1, PROGRAM, "1", environment={"LENTANDO_TIMELINE": str(tmp_path)})
    assert job.status == 0, job.output
    first = report(capsys, str(tmp_path))
    assert first["verdict"]["sentence"] == "There is nothing to compare: the job has one rank."
    assert report(capsys, str(tmp_path)) == first
