"""Points at which ranks of an elastic job kill themselves: given by a test, or drawn at random."""

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Death = tuple[int, str, float]
"""Number of the rank at the start; method of its transport, "any" of them, or "seconds"; how many of these."""

METHODS = ("exchange", "allgather", "allreduce", "broadcast", "vote", "repair")
LONGEST_SECONDS = 4.0
MOST_CALLS = 300


def parsed(texts: Sequence[str]) -> list[Death]:
    """Deaths from ``NUMBER:METHOD:COUNT``: before that rank calls that method for the so many-th time."""
    return [(int(number), method, float(count)) for number, method, count in (text.split(":") for text in texts)]


def drawn(seed: int, deaths: int, size: int) -> list[Death]:
    """Deaths at random, the same on all ranks. One rank lives."""
    choice = random.Random(seed)
    found: list[Death] = []
    for number in choice.sample(range(size), min(deaths, size - 1)):
        if choice.random() < 0.5:
            found.append((number, "seconds", choice.uniform(0, LONGEST_SECONDS)))
        else:
            found.append((number, "any", choice.randrange(1, MOST_CALLS)))
    return found


def die() -> None:
    """By SIGKILL, which no process can do anything about."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(method: str, count: float) -> None:
    """Kill this process there, counted from now: after ``init()``."""
    if method == "seconds":
        timer = threading.Timer(count, die)
        timer.daemon = True
        timer.start()
        return
    from lentando.comm.transports.mpi.elastic import ElasticMPITransport  # loads MPI, which is for init() to do

    calls: Counter[str] = Counter()

    def dying(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            calls.update([name, "any"])
            if calls[method] >= count:
                die()
            return original(*arguments, **options)

        return called

    for name in METHODS:
        setattr(ElasticMPITransport, name, dying(name, getattr(ElasticMPITransport, name)))
