"""Horovod for NumPy arrays: named collectives that run in Horovod's background thread.

Horovod accepts only the tensors of a framework. A binding passes the memory of NumPy arrays as such, without a copy.
"""

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from lentando.comm.errors import LaunchError, TransportError
from lentando.comm.transport import Array, ReduceOp

__all__ = ["REDUCED_HERE", "Collective", "HorovodBinding", "HorovodWorld", "finish", "load_binding", "translated_error"]

REDUCED_HERE = ("int32", "int64", "float32", "float64")
"""Dtypes that Horovod reduces exactly enough. Sums in float16 are rounded after each addition."""

SHORTEST_NAP_SECONDS = 5e-5
LONGEST_NAP_SECONDS = 1e-3
"""Intervals at which a collective is polled. The longest is Horovod's cycle time, after which it starts operations."""

_BINDINGS = {"torch": "torch_binding", "tensorflow": "tensorflow_binding"}
"""Module of the binding of each framework."""


class Collective(Protocol):
    """A collective that this rank has submitted. It keeps its arrays alive."""

    def done(self) -> bool:
        """Return whether the collective is complete, without blocking."""

    def result(self) -> Array:
        """Return the result of a complete collective, or raise a ``TransportError``."""


class HorovodBinding(Protocol):
    """Horovod, initialised. A collective starts when all ranks have submitted one of the same name.

    Attributes:
        module: name of Horovod's Python module in use.
    """

    module: str

    def size(self) -> int:
        """Return the number of ranks."""

    def rank(self) -> int:
        """Return the rank of this process."""

    def local_size(self) -> int:
        """Return the number of ranks on this node."""

    def local_rank(self) -> int:
        """Return the number of this process on its node."""

    def allreduce(self, name: str, array: Array, op: ReduceOp) -> Collective:
        """Reduce an array in place; its dtype is one of ``REDUCED_HERE``."""

    def broadcast(self, name: str, memory: Array, root: int) -> Collective:
        """Broadcast bytes in place from rank ``root``."""

    def allgather(self, name: str, memory: Array) -> Collective:
        """Concatenate the bytes of all ranks."""

    def alltoall(self, name: str, words: Array, splits: Sequence[int]) -> Collective:
        """Send the first ``splits[0]`` words to rank 0, and so on; concatenate the words that arrive, by sender."""


class HorovodWorld:
    """The part of a ``HorovodBinding`` that all bindings share: the ranks. Joins Horovod's job, unless the program has.

    Args:
        hvd: Horovod's module for the framework.
    """

    def __init__(self, hvd: Any) -> None:
        self._hvd = hvd
        self._operations = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max}
        if not hvd.is_initialized():
            hvd.init()

    def size(self) -> int:
        """Return the number of ranks."""
        return int(self._hvd.size())

    def rank(self) -> int:
        """Return the rank of this process."""
        return int(self._hvd.rank())

    def local_size(self) -> int:
        """Return the number of ranks on this node."""
        return int(self._hvd.local_size())

    def local_rank(self) -> int:
        """Return the number of this process on its node."""
        return int(self._hvd.local_rank())


def load_binding() -> HorovodBinding:
    """Return the binding of the imported framework, or of any that Horovod was built for, and initialise Horovod.

    Raises:
        LaunchError: if Horovod was built for no installed framework, or cannot join its job.
    """
    reasons = []
    for framework in sorted(_BINDINGS, key=lambda name: name not in sys.modules):
        if find_spec(framework) is None:
            reasons.append(f"{framework} is not installed")
            continue
        try:
            module = import_module(f"lentando.comm.transports.horovod.{_BINDINGS[framework]}")
        except ImportError as error:
            reasons.append(f"{framework}: {error}")
            continue
        try:
            binding: HorovodBinding = module.open_binding()
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"Horovod could not join its job: {error}") from error
        return binding
    raise LaunchError(
        f"Horovod's Python binding cannot be loaded ({'; '.join(reasons)}). Build Horovod for the framework that is "
        "installed here (HOROVOD_WITH_PYTORCH=1 or HOROVOD_WITH_TENSORFLOW=1, and HOROVOD_WITH_GLOO=1, before pip "
        "install --no-build-isolation horovod), or start with mpirun or horovodrun --mpi, which need none"
    )


_LOST = ("Horovod has been shut down", "gloo/transport/", "Connection reset", "Connection closed", "Broken pipe")
"""Parts of the messages of Horovod and Gloo after the end of another rank. They differ between ranks."""


def translated_error(error: BaseException | None) -> TransportError:
    """Return the error to raise for one of Horovod. The text for a lost rank is the same on all remaining ranks."""
    if any(part in str(error) for part in _LOST):
        return TransportError(
            "Horovod failed: a rank has died, or has left the job without the others. See its last output for the "
            "reason, or the output of horovodrun. Restart the job from the last checkpoint"
        )
    return TransportError(f"Horovod failed: {error}")


def finish(collective: Collective) -> Array:
    """Wait for a collective by polling and sleeping, because a wait in Horovod keeps a core busy."""
    nap = SHORTEST_NAP_SECONDS
    while not collective.done():
        time.sleep(nap)
        nap = min(1.5 * nap, LONGEST_NAP_SECONDS)
    return collective.result()
