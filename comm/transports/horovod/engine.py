"""Horovod's engine as NumPy sees it: named collectives that run in its background thread.

Horovod takes the tensors of a framework only. A binding hands it NumPy's memory in that form, without a copy.
"""

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from lentando.comm.errors import LaunchError, TransportError
from lentando.comm.transport import Array, ReduceOp

__all__ = ["REDUCED_HERE", "Collective", "Engine", "HorovodWorld", "as_ours", "finish", "load_engine"]

REDUCED_HERE = ("int32", "int64", "float32", "float64")
"""Dtypes that Horovod reduces well: float16 it rounds after each addition."""

SHORTEST_NAP_SECONDS = 5e-5
LONGEST_NAP_SECONDS = 1e-3
"""Of Horovod's own cycle: it looks for new operations this often."""

_BINDINGS = {"torch": "torch_binding", "tensorflow": "tensorflow_binding"}
"""By framework, the module that knows it."""


class Collective(Protocol):
    """A collective operation that this rank has asked for. It keeps its arrays alive."""

    def done(self) -> bool:
        """True once complete; never blocks."""

    def result(self) -> Array:
        """What came out, once it is done. Raises ``TransportError``."""


class Engine(Protocol):
    """Horovod, initialised. An operation begins when all ranks have asked for it by the same name.

    Attributes:
        binding: the Python module in use.
    """

    binding: str

    def size(self) -> int:
        """Number of ranks."""

    def rank(self) -> int:
        """This process among them."""

    def local_size(self) -> int:
        """Number of ranks on this node."""

    def local_rank(self) -> int:
        """This process among those."""

    def allreduce(self, name: str, array: Array, op: ReduceOp) -> Collective:
        """In place, for a dtype of ``REDUCED_HERE``."""

    def broadcast(self, name: str, memory: Array, root: int) -> Collective:
        """In place, for bytes."""

    def allgather(self, name: str, memory: Array) -> Collective:
        """The bytes of all ranks, one after the other."""

    def alltoall(self, name: str, words: Array, splits: Sequence[int]) -> Collective:
        """Send the first ``splits[0]`` words to rank 0, and so on; what came follows by rank, without its lengths."""


class HorovodWorld:
    """The part of an ``Engine`` that is the same in every binding: who is there.

    Args:
        hvd: the binding's module of Horovod's. Joins Horovod's job, unless the program has.
    """

    def __init__(self, hvd: Any) -> None:
        self._hvd = hvd
        self._operations = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max}
        if not hvd.is_initialized():
            hvd.init()

    def size(self) -> int:
        """Number of ranks."""
        return int(self._hvd.size())

    def rank(self) -> int:
        """This process among them."""
        return int(self._hvd.rank())

    def local_size(self) -> int:
        """Number of ranks on this node."""
        return int(self._hvd.local_size())

    def local_rank(self) -> int:
        """This process among those."""
        return int(self._hvd.local_rank())


def load_engine() -> Engine:
    """Horovod through the binding of the framework in use, or of any that it is built for; initialised if need be.

    Raises:
        LaunchError: if it is built for none, or cannot join its job.
    """
    reasons = []
    for framework in sorted(_BINDINGS, key=lambda name: name not in sys.modules):
        if find_spec(framework) is None:
            reasons.append(f"{framework} is not installed")
            continue
        try:
            binding = import_module(f"lentando.comm.transports.horovod.{_BINDINGS[framework]}")
        except ImportError as error:
            reasons.append(f"{framework}: {error}")
            continue
        try:
            engine: Engine = binding.open_engine()
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"Horovod could not join its job: {error}") from error
        return engine
    raise LaunchError(
        f"Horovod's Python binding cannot be loaded ({'; '.join(reasons)}). Build Horovod for the framework that is "
        "installed here (HOROVOD_WITH_PYTORCH=1 or HOROVOD_WITH_TENSORFLOW=1, and HOROVOD_WITH_GLOO=1, before pip "
        "install --no-build-isolation horovod), or start with mpirun or horovodrun --mpi, which need none"
    )


_LOST = ("Horovod has been shut down", "gloo/transport/", "Connection reset", "Connection closed", "Broken pipe")
"""What Horovod says, in its own words or Gloo's, when another rank is gone. Each rank notices something else of it."""


def as_ours(error: BaseException | None) -> TransportError:
    """An error of Horovod's, of which a lost rank reads the same on all that are left; theirs is its cause."""
    if any(words in str(error) for words in _LOST):
        return TransportError(
            "Horovod failed: a rank has died, or has left the job without the others. What it wrote last tells why, or "
            "what horovodrun says of how it ended. Start the job again from the last checkpoint"
        )
    return TransportError(f"Horovod failed: {error}")


def finish(collective: Collective) -> Array:
    """Wait for a collective, asleep most of the time: Horovod's own way to wait keeps a core busy."""
    nap = SHORTEST_NAP_SECONDS
    while not collective.done():
        time.sleep(nap)
        nap = min(1.5 * nap, LONGEST_NAP_SECONDS)
    return collective.result()
