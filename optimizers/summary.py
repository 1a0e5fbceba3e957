"""A table of what every rank of a job has done, for people."""

import socket
from typing import Any

from lentando.comm.checked_calls import gather_objects
from lentando.comm.numbering import numbers_of
from lentando.comm.text_tables import text_table
from lentando.comm.transport import Transport

__all__ = ["summary_of"]

HEADER = ["rank", "host", "steps", "rounds", "MB sent", "ms per step", "ms computing", "s waiting", "s communicating"]


def summary_of(transport: Transport, report: dict[str, Any]) -> str:
    """Return a table of the reports of all ranks, the same on every rank. Collective.

    Args:
        transport: transport of the ranks that train together.
        report: report of this rank, as ``report_of`` returns it.

    Raises:
        MismatchError: on every rank, if one of them does something else.
    """
    found = gather_objects(transport, "summary", [socket.gethostname(), report])
    rows = [_row(number, *own) for number, own in zip(numbers_of(transport), found, strict=True)]
    return text_table(HEADER, rows)


def _row(number: int, host: str, report: dict[str, Any]) -> list[str]:
    step, compute, waiting = report["seconds_per_step"], report["compute_seconds"], report["waiting_seconds"]
    return [
        str(number),
        host,
        str(report["inner_steps"]),
        str(report["rounds"]),
        f"{report['bytes_sent'] / 1e6:.1f}",
        "" if step is None else f"{1e3 * step:.2f}",
        "" if compute is None else f"{1e3 * compute:.2f}",
        f"{waiting:.2f}",
        f"{max(0.0, report['communication_seconds'] - waiting):.2f}",
    ]
