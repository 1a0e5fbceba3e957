"""Gloo groups of Lentando alone, over the ranks of a process group of the program.

Messages match by the order in which a group's ranks start them, so that a group is never shared: neither with the
program nor between threads. A group is made from the store of the program's process group, or from that of the job.
Making it involves its members only, and is invisible to the program, whose own groups are numbered as if it were not
there.
"""

import datetime as dt
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lentando.comm.errors import ConfigurationError, LaunchError
from lentando.comm.startup_timeout import startup_timeout
from lentando.comm.transports.torch_distributed.meeting import agree_on_name

if not dist.is_available():
    raise ImportError("this PyTorch was built without torch.distributed")
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]  # not in its stubs
from torch.distributed.rendezvous import rendezvous

__all__ = ["GlooGroup", "Groups", "Work"]

TIMEOUT = dt.timedelta(days=365)
"""Longest wait for other ranks: as over other backends, it is the stall inspector that limits and reports waits."""

_PREFIX = "lentando"
"""Start of the keys of these groups in the store."""


class Work(Protocol):
    """An operation that torch.distributed has started, as far as it is used here. It keeps its tensors alive."""

    def wait(self) -> bool:
        """Return once it is complete, or raise a RuntimeError."""

    def is_completed(self) -> bool:
        """Return whether a collective is complete. Of a message, it only knows whether it has been waited for."""


class GlooGroup(Protocol):
    """``ProcessGroupGloo``, as far as it is used here: its type stubs are incomplete. Every method starts a ``Work``.

    A message is lost if its ``Work`` is garbage before it has been received.
    """

    def send(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work:
        """Send a tensor to another rank."""

    def recv(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work:
        """Fill a tensor by a message of the same size. A longer message ends the process."""

    def recv_anysource(self, tensors: list[Tensor], tag: int, /) -> Work:
        """Fill a tensor by a message of any other rank."""

    def allreduce(self, tensors: list[Tensor], options: Any, /) -> Work:
        """Reduce a tensor in place."""

    def broadcast(self, tensors: list[Tensor], options: Any, /) -> Work:
        """Broadcast a tensor in place."""

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], /) -> Work:
        """Gather a tensor of each rank."""


def _unused_part(store: Store, rank: int, size: int) -> Store:
    """Return the part of a store whose keys neither the program nor earlier ranks have used. Collective."""
    store = PrefixStore(_PREFIX, store)
    return PrefixStore(agree_on_name(store, rank, size), store)


class Groups:
    """Makes Gloo groups over the same ranks.

    Args:
        store: store through which the ranks find each other; no other object uses its keys.
        rank: number of this process among the ranks; None if it is not one of them.
        size: number of ranks.
    """

    def __init__(self, store: Store, rank: int | None, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._made = 0

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None) -> "Groups":
        """Return what makes groups of the ranks of a process group. All of its ranks call it equally often.

        Args:
            process_group: the process group; None for the default group.

        Raises:
            ConfigurationError: if this process is not one of its ranks.
            LaunchError: if this PyTorch is too old.
        """
        process_group = dist.group.WORLD if process_group is None else process_group
        if not isinstance(process_group, dist.ProcessGroup) or process_group.rank() < 0:
            raise ConfigurationError(
                f"process_group={process_group!r}: expected a process group of torch.distributed that this process is "
                "a member of. Call init(process_group=...) on its members only"
            )
        if not hasattr(process_group, "get_group_store"):
            raise LaunchError(
                f"PyTorch {torch.__version__} is too old for this transport, because its process groups have no "
                "get_group_store(): install a newer PyTorch, or start with mpirun"
            )
        store, rank, size = process_group.get_group_store(), process_group.rank(), process_group.size()
        with startup_timeout(rank, size):
            return cls(_unused_part(store, rank, size), rank, size)

    @classmethod
    def of_job(cls, rank: int, size: int, *, default_group: bool) -> "Groups":
        """Return what makes groups of the ranks that meet where the environment variables of torch.distributed say.

        Args:
            rank: number of this process.
            size: number of ranks.
            default_group: whether torch.distributed gets a default group of these ranks, too.

        Raises:
            LaunchError: if the ranks cannot meet at this address.
        """
        try:
            store, rank, size = next(rendezvous("env://", rank, size))
            store = _unused_part(store, rank, size)
            if default_group:
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"torch.distributed could not join its job: {error}") from error
        return cls(PrefixStore(_PREFIX, store), rank, size)

    def make(self) -> GlooGroup:
        """Make a group. Collective."""
        assert self.rank is not None
        return cast(GlooGroup, ProcessGroupGloo(self._next_store(), self.rank, self.size, TIMEOUT))

    def among(self, ranks: Sequence[int] | None = None) -> "Groups":
        """Return what makes groups of some of the ranks, or of all. Collective over all ranks, members or not.

        Args:
            ranks: the members, which are numbered in this order.
        """
        store = self._next_store()
        if ranks is None:
            return Groups(store, self.rank, self.size)
        return Groups(store, ranks.index(self.rank) if self.rank in ranks else None, len(ranks))

    def _next_store(self) -> Store:
        self._made += 1
        return PrefixStore(str(self._made), self._store)
