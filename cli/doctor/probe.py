"""The process that joins the job on behalf of a rank, which watches it (``watch``).

It reads the rank's facts from its standard input, joins the job, gathers the facts of all ranks, and tests the
all-reduce of every transport that can be opened. It writes its results as lines of JSON, each as soon as it is known,
so that the lines show how far the process came if it hangs or dies.
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
"""Duration of the all-reduce test of one transport."""
ELEMENTS = 1_000_000
"""Elements of the float32 array: 4 MB, large enough for bandwidth to dominate."""


def main() -> None:
    """Join the job, report, test the transports, and leave."""
    # Output of libraries goes to stderr, which is shown if the process fails; stdout has nothing but lines of JSON.
    with os.fdopen(os.dup(1), "w") as reports:
        os.dup2(2, 1)

        def report(**values: Any) -> None:
            reports.write(f"{json.dumps(values)}\n")
            reports.flush()

        try:
            _join_and_test(json.load(sys.stdin), report)
        except LentandoError as error:
            report(refused=str(error))
    # MPI is finalised at the exit of the process, for which the watching process waits.


def _join_and_test(facts: Facts, report: Callable[..., None]) -> None:
    report(stage="joining the job")
    joined = open_transport()
    report(stage=f"the first messages of transport {joined.name}", size=joined.size)
    facts_by_rank = allgather_object(joined, {**facts, "place": _place(joined)})
    report(rank=joined.rank, facts_by_rank=facts_by_rank if joined.rank == 0 else None)
    report(stage=f"the all-reduce of transport {joined.name}")
    report(transport=joined.name, tests=allgather_object(joined, _test(joined)))
    for name in TRANSPORT_NAMES:
        if name != joined.name:
            report(stage=f"transport {name}")
            report(transport=name, tests=_try(name, joined))
    report(stage="leaving the job")
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
    """Return the thread level of MPI, or None if MPI is not in use."""
    module: Any = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized():
        return None
    names = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next((name for name in names if getattr(module, f"THREAD_{name}") == module.Query_thread()), None)


def _try(name: str, joined: Transport) -> list[dict[str, Any]]:
    """Return every rank's test of another transport, or its failures if some rank cannot open the transport."""
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
    """Test all-reduce against the known sum, and time it for a second."""
    place = {"rank": transport.rank, "size": transport.size, "thread_level": _thread_level()}
    expected = np.float32(transport.size * (transport.size + 1) // 2)
    values = np.empty(ELEMENTS, np.float32)

    def is_sum_right() -> bool:
        values.fill(transport.rank + 1)
        transport.allreduce(values)
        return bool((values == expected).all())

    if not is_sum_right():
        return {**place, "is_right": False, "found": float(values[values != expected][0]), "expected": float(expected)}
    if transport.size == 1:
        return {**place, "is_right": True, "seconds": None}
    times = [_timed(transport, values)]
    slowest = np.array([times[0]])
    transport.allreduce(slowest, "max")  # all ranks repeat it equally often
    times = [_timed(transport, values) for _ in range(max(1, int(TEST_SECONDS / max(float(slowest[0]), 1e-4))))]
    seconds = float(np.median(times))
    return {**place, "is_right": is_sum_right(), "seconds": seconds, "bytes": values.nbytes, "repeats": len(times)}


def _timed(transport: Transport, values: "np.ndarray[Any, Any]") -> float:
    values.fill(1)
    started = transport.clock()
    transport.allreduce(values)
    return transport.clock() - started


if __name__ == "__main__":
    main()
