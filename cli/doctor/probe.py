"""The process of a rank that joins the job, in place of the one that watches it (``joining``).

It takes the rank's facts from its standard input, joins, puts the facts of all ranks together, and tries the all-reduce
of every transport that opens here. It writes what it finds as lines of JSON, each as soon as it is known: wherever the
process hangs or dies, the lines before tell how far it came.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from lentando.cli.doctor.facts import Facts, Place
from lentando.comm.errors import LentandoError
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport
from lentando.comm.transport_selection import TRANSPORT_NAMES, open_transport

__all__ = ["main"]

TEST_SECONDS = 1.0
"""How long the all-reduce of one transport is tried."""
ELEMENTS = 1_000_000
"""Of the array, in float32: 4 MB, where bandwidth counts."""


def main() -> None:
    """Join, tell, test, leave."""
    # What libraries print belongs to what the watcher shows of a process that fails, not between the lines of JSON.
    with os.fdopen(os.dup(1), "w") as reports:
        os.dup2(2, 1)

        def tell(**found: Any) -> None:
            reports.write(f"{json.dumps(found)}\n")
            reports.flush()

        try:
            _join_and_test(json.load(sys.stdin), tell)
        except LentandoError as error:
            tell(refused=str(error))
    # MPI is finalised at the exit of the process; the watcher waits for that too.


def _join_and_test(facts: Facts, tell: Callable[..., None]) -> None:
    tell(stage="joining the job")
    joined = open_transport()
    tell(stage=f"the first messages of transport {joined.name}", size=joined.size)
    everyone = allgather_object(joined, {**facts, "place": _place(joined)})
    tell(rank=joined.rank, everyone=everyone if joined.rank == 0 else None)
    tell(stage=f"the all-reduce of transport {joined.name}")
    tell(transport=joined.name, tests=allgather_object(joined, _test(joined)))
    for name in TRANSPORT_NAMES:
        if name != joined.name:
            tell(stage=f"transport {name}")
            tell(transport=name, tests=_try(name, joined))
    tell(stage="leaving the job")
    joined.close()


def _place(joined: Transport) -> Place:
    return Place(
        transport=joined.name,
        rank=joined.rank,
        size=joined.size,
        local_rank=joined.local_rank,
        local_size=joined.local_size,
    )


def _thread_level() -> str | None:
    """MPI's, where it runs."""
    module: Any = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized():
        return None
    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next((name for name in names if getattr(module, f"THREAD_{name}") == module.Query_thread()), None)


def _try(name: str, joined: Transport) -> list[dict[str, Any]]:
    """Every rank's test of a transport other than the one by which they talk; nobody tests unless all could open it."""
    os.environ["LENTANDO_TRANSPORT"] = name
    opened: Transport | None = None
    failure: dict[str, Any] = {}
    try:
        opened = open_transport()
    except LentandoError as error:
        failure = {"error": str(error)}
    failures: list[dict[str, Any]] = allgather_object(joined, failure)
    if any(failures):
        return failures
    assert opened is not None
    tests: list[dict[str, Any]] = allgather_object(joined, _test(opened))
    opened.close()
    return tests


def _test(transport: Transport) -> dict[str, Any]:
    """Sums that everybody knows, for a second; how long one takes."""
    place = {"rank": transport.rank, "size": transport.size, "thread_level": _thread_level()}
    expected = np.float32(transport.size * (transport.size + 1) // 2)
    values = np.empty(ELEMENTS, np.float32)

    def total_is_right() -> bool:
        values.fill(transport.rank + 1)
        transport.allreduce(values)
        return bool((values == expected).all())

    if not total_is_right():
        return {**place, "is_right": False, "found": float(values[values != expected][0]), "expected": float(expected)}
    if transport.size == 1:
        return {**place, "is_right": True, "seconds": None}
    times = [_timed(transport, values)]
    slowest = np.array([times[0]])
    transport.allreduce(slowest, "max")  # all repeat it equally often
    times = [_timed(transport, values) for _ in range(max(1, int(TEST_SECONDS / max(float(slowest[0]), 1e-4))))]
    seconds = float(np.median(times))
    return {**place, "is_right": total_is_right(), "seconds": seconds, "bytes": values.nbytes, "repeats": len(times)}


def _timed(transport: Transport, values: "np.ndarray[Any, Any]") -> float:
    values.fill(1)
    started = transport.clock()
    transport.allreduce(values)
    return transport.clock() - started


if __name__ == "__main__":
    main()
