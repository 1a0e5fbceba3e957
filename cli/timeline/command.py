"""``lentando timeline``: merges the traces of all ranks, and prints who waits for whom."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lentando.cli.quantities import format_seconds
from lentando.cli.tables import print_table
from lentando.cli.timeline.traces import Trace, read_traces
from lentando.cli.timeline.waiting import Meeting, judge, meetings, times_of
from lentando.comm.errors import ConfigurationError

__all__ = ["timeline"]


def timeline(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the timeline of each rank.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Merged trace. [default: DIR/merged.json]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge the timelines of all ranks into one, and print who waits for whom.

    Record a job, then look at it:

    LENTANDO_TIMELINE=runs/timeline mpirun -np 4 python train.py

    lentando timeline runs/timeline

    The merged trace opens in https://ui.perfetto.dev and in chrome://tracing. Arrows lead from the rank that reached a
    communication last to the ranks that waited for it.
    """
    merged = output or folder / "merged.json"
    traces = read_traces(folder, merged)
    met = meetings(traces)
    times = times_of(traces, met)
    verdict = judge(times, [trace.link_us for trace in traces])
    try:
        merged.write_text(json.dumps(sorted([*_events(traces), *_arrows(met)], key=_place_in_time)))
    except OSError as error:
        raise ConfigurationError(f"cannot write {merged}: {error.strerror}") from error
    if as_json:
        ranks = [asdict(own) for own in times]
        typer.echo(json.dumps({"communications": len(met), "microseconds_by_rank": ranks, "verdict": asdict(verdict)}))
        return
    print_table(
        ["rank", "computing", "waiting", "communicating", "the others waited for it", "last in"],
        [
            [
                str(rank),
                *(_share(part, own.total) for part in (own.computing, own.waiting, own.communicating)),
                format_seconds(own.awaited / 1e6),
                f"{own.last} of {max(len(met) - 1, 0)}",
            ]
            for rank, own in enumerate(times)
        ],
    )
    uncertainty = max(trace.clock_uncertainty_us for trace in traces)
    typer.echo(f"\n{verdict.sentence}\n\nClocks are aligned within {uncertainty:.0f} us. Merged trace: {merged}")


def _share(part_us: float, total_us: float) -> str:
    return f"{format_seconds(part_us / 1e6)} ({part_us / total_us if total_us else 0:.0%})"


def _events(traces: Sequence[Trace]) -> Iterator[dict[str, Any]]:
    for trace in traces:
        yield from trace.events


def _arrows(met: Sequence[Meeting]) -> Iterator[dict[str, Any]]:
    """Flow events from the rank that was last to those that waited for it."""
    for number, meeting in enumerate(met):
        source = meeting.spans[meeting.last]
        for rank, span in enumerate(meeting.spans):
            # In gossip, a rank may leave before the last one comes: it has not waited for that one.
            if rank != meeting.last and span.began < meeting.complete_us <= span.ended:
                about = {"name": "waited for", "cat": "waiting", "id": f"{number}.{rank}", "ts": meeting.complete_us}
                yield {**about, "ph": "s", **_place(source.event)}
                yield {**about, "ph": "f", "bp": "e", **_place(span.event)}


def _place_in_time(event: dict[str, Any]) -> tuple[float, float]:
    """By the beginning; of spans that begin together, the outer one comes first."""
    return event["ts"], -event.get("dur", 0.0)


def _place(event: dict[str, Any]) -> dict[str, Any]:
    return {"pid": event["pid"], "tid": event["tid"]}
