"""Everything that belongs to one job on this rank, apart from its transport: one ``Job`` for each transport.

A module that keeps state for a job defines a class for it and asks the job for its instance: the turns of threads
(``turns``), the decisions of the tuner (``reductions.tuning``), the members of an elastic job (``elastic``), the stall
inspector (``stall``), notices of neighbours (``notices``), borrowed transports (``thread_transports``), checks that are
pending until shutdown (``final_checks``), work to be completed then (``begun_work``), and the number of replicas
(``optimizers.replica``). A job begins empty, and ends together with its transport.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from lentando.comm.transport import Transport

__all__ = ["Job", "drop_from_all_jobs", "job_of"]

T = TypeVar("T")


class Job:
    """State of one job: one object of each class.

    An object that refers to the transport keeps it alive, and must be dropped at the end of the job.

    Example:
        >>> from dataclasses import dataclass
        >>> from lentando.comm.transports.single import SingleTransport
        >>> @dataclass
        ... class Calls:
        ...     count: int = 0
        >>> transport = SingleTransport()
        >>> job_of(transport).find(Calls) is None
        True
        >>> job_of(transport).get(Calls).count += 1
        >>> job_of(transport).get(Calls)
        Calls(count=1)
    """

    def __init__(self) -> None:
        self._states: dict[type[Any], Any] = {}
        self._creating = threading.Lock()

    def find(self, kind: type[T]) -> T | None:
        """The object of this class, None if there is none."""
        return self._states.get(kind)

    def get(self, kind: type[T], create: Callable[[], T] | None = None) -> T:
        """The object of this class, which is created at the first call.

        Args:
            kind: the class, by which the object is found.
            create: makes the object; the class itself, without arguments, by default.
        """
        state: T | None = self._states.get(kind)
        if state is None:
            with self._creating:
                state = self._states.setdefault(kind, (create or kind)())
        return state

    def put(self, state: object) -> None:
        """Keep this as the object of its class."""
        self._states[type(state)] = state

    def drop(self, kind: type[T]) -> T | None:
        """Remove the object of this class, and return it; None if there is none."""
        state: T | None = self._states.pop(kind, None)
        return state


_jobs: WeakKeyDictionary[Transport, Job] = WeakKeyDictionary()
_creating = threading.Lock()


def job_of(transport: Transport) -> Job:
    """The job of a transport, which is created at the first call. Any thread may call it."""
    job = _jobs.get(transport)
    if job is None:
        with _creating:
            job = _jobs.setdefault(transport, Job())
    return job


def drop_from_all_jobs(kind: type[Any]) -> None:
    """Remove the object of this class from every job of this process, for a child process that must not inherit it."""
    for job in list(_jobs.values()):
        job.drop(kind)
