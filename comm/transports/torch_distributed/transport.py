"""The transport over process groups of torch.distributed: arrays in host memory, over Gloo."""

import hashlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from lentando.comm.closed import mark_closed
from lentando.comm.errors import TransportError
from lentando.comm.forked import refuse_in_children
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic, as_bytes, check_rank
from lentando.comm.transports.mailbox import Mailbox, Receive
from lentando.comm.transports.torch_distributed.errors import TranslatedErrors
from lentando.comm.transports.torch_distributed.exchange import TorchExchange
from lentando.comm.transports.torch_distributed.groups import Groups, Work
from lentando.comm.transports.torch_distributed.short_messages import PROBE_SECONDS, ShortMessages
from lentando.comm.transports.torch_distributed.unmatched import end_unmatched
from lentando.comm.transports.torch_distributed.waiting import MessageInFlight, Messages, WaitingThreads
from lentando.comm.transports.wider_dtypes import reduce_by

__all__ = ["TorchTransport"]

BARRIER_TAG, NODE_BARRIER_TAG, SHORT_MESSAGES_TAG = 32_768, 32_769, 32_770
"""Tags above all tags of ``exchange``. Short messages use the next one as well."""
POLL_SECONDS = 1e-3
"""Interval between two polls of a background thread, unless it has other things to do."""

_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
_REDUCED = ("int8", "uint8", "int32", "int64", "float32", "float64")
"""Dtypes that Gloo reduces exactly enough. Sums in half precision are rounded after each addition."""


class TorchTransport:
    """The ranks of a process group, over Gloo groups of its own.

    Args:
        groups: makes the groups.
        owns_default_group: whether to destroy the default group of torch.distributed at the end.
    """

    name = "torch"
    same_node: Sequence[int]

    def __init__(self, groups: Groups, *, owns_default_group: bool = False) -> None:
        assert groups.rank is not None
        self._groups = groups
        self._owns_default_group = owns_default_group
        self.rank, self.size = groups.rank, groups.size
        self._group = groups.make()
        self.traffic = Traffic()
        self._threads = WaitingThreads()
        self._mailboxes: defaultdict[int, Mailbox] = defaultdict(Mailbox)
        self._short_messages: ShortMessages | None = None
        self._others: list[TorchTransport] = []
        self._pause: Callable[[], None] | None = None  # called again and again by a thread that waits
        self._probed_at = 0.0
        nodes = self.allgather(np.frombuffer(_node_identity(), np.uint8).copy())
        self.same_node = [rank for rank in range(self.size) if (nodes[rank] == nodes[self.rank]).all()]
        self.local_rank, self.local_size = self.same_node.index(self.rank), len(self.same_node)
        self.traffic = Traffic()
        refuse_in_children(self)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        for peer, _ in (*sends, *receives):
            check_rank(peer, self.size, "exchange with")
        self.traffic.messages += len(sends)
        self.traffic.bytes_sent += sum(array.nbytes for _, array in sends)
        return self._start(sends, receives, tag)

    def _start(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> TorchExchange:
        messages: Messages = []
        posted: list[Receive] = []
        for peer, array in receives:
            if peer == self.rank:
                posted.append(Receive(array))
                self._mailboxes[tag].post(posted[-1])
            elif array.nbytes:
                with TranslatedErrors(peer):
                    work = self._group.recv([_tensor(as_bytes(array))], peer, tag)
                messages.append(MessageInFlight(work, peer, is_sent=False, tag=tag, nbytes=array.nbytes))
        for peer, array in sends:
            if peer == self.rank:
                self._mailboxes[tag].send(array)
            elif array.nbytes:
                with TranslatedErrors(peer):
                    work = self._group.send([_readable(as_bytes(array))], peer, tag)
                messages.append(MessageInFlight(work, peer, is_sent=True, tag=tag, nbytes=array.nbytes))
        return TorchExchange(messages, posted, self._threads, self._pause)

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        def reduce(reduced: Array) -> None:
            if reduced.size:
                options: Any = dist.AllreduceOptions()
                options.reduceOp = _OPS[op]
                self._finish(lambda: self._group.allreduce([_tensor(reduced)], options))

        reduce_by(reduce, array, op, _REDUCED, "torch.distributed")
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def broadcast(self, array: Array, root: int = 0) -> None:
        check_rank(root, self.size, "broadcast from")
        if array.nbytes:
            tensor = (_readable if self.rank == root else _tensor)(as_bytes(array))
            options = dist.BroadcastOptions()
            options.rootRank = root
            self._finish(lambda: self._group.broadcast([tensor], options))
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        gathered = np.empty((self.size, *array.shape), array.dtype)
        if array.nbytes:
            outputs = list(_tensor(as_bytes(gathered)).reshape(self.size, -1))
            tensor = _readable(as_bytes(array))
            self._finish(lambda: self._group.allgather([outputs], [tensor]))
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        self._meet(range(self.size), BARRIER_TAG)
        self.traffic.count_collective(0)

    def node_barrier(self) -> None:
        self._meet(self.same_node, NODE_BARRIER_TAG)
        self.traffic.count_collective(0)

    def _meet(self, ranks: Sequence[int], tag: int) -> None:
        """Wait for some ranks. Gloo's own barrier, of all ranks, takes five times as long on one node.

        The message of each round has come, directly or indirectly, from twice as many ranks as the previous one.
        """
        own, distance = ranks.index(self.rank), 1
        while distance < len(ranks):
            to, source = (ranks[(own + step) % len(ranks)] for step in (distance, -distance))
            token = np.zeros(2, np.uint8)
            self._start([(to, token[:1])], [(source, token[1:])], tag).wait()
            distance *= 2

    def for_thread(self) -> "BackgroundTorchTransport":
        transport = BackgroundTorchTransport(self._groups.among())
        self._others.append(transport)
        return transport

    def for_ranks(self, ranks: Sequence[int]) -> "TorchTransport | None":
        groups = self._groups.among(ranks)
        return None if groups.rank is None else TorchTransport(groups)

    def open_side_channel(self) -> bool:
        self._opened_short_messages()
        return True

    def send_nowait(self, peer: int, content: bytes) -> None:
        self._opened_short_messages().send_content(peer, content)

    def receive_nowait(self) -> tuple[int, bytes] | None:
        received = self._opened_short_messages().receive_content()
        if received is None:
            self._probe()
        return received

    def has_sent_all(self) -> bool:
        return True  # threads of Gloo send and receive

    def leave_notice(self, peer: int, number: int) -> None:
        self._opened_short_messages().leave_notice(peer, number)

    def read_notice(self, peer: int) -> int | None:
        number = self._opened_short_messages().read_notice(peer)
        if number is None:
            self._probe()
        return number

    def take_notice(self, peer: int) -> int:
        while (number := self.read_notice(peer)) is None:
            self._opened_short_messages().wait_for_notice(peer, POLL_SECONDS)
            if self._pause is not None:
                self._pause()
        return number

    def _probe(self) -> None:
        """Raise ``TransportError`` if another rank has died. Asks at an interval, however often this is called."""
        if time.monotonic() > self._probed_at + PROBE_SECONDS:
            self._probed_at = time.monotonic()
            self._opened_short_messages().probe()

    def _opened_short_messages(self) -> ShortMessages:
        if self._short_messages is None:
            self._short_messages = ShortMessages(self._group, self.rank, self.size, SHORT_MESSAGES_TAG, self._threads)
        return self._short_messages

    def clock(self) -> float:
        return time.perf_counter()

    def abort(self, status: int = 1) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # torchrun then ends the other ranks, whose connections to this one are closed

    def close(self) -> None:
        transports = [self, *self._others]
        has_opened = np.array([each._short_messages is not None for each in transports], np.uint8)  # noqa: SLF001
        self.allreduce(has_opened, "max")  # a rank may have left notices for one that has never read any
        for each, must_close in zip(transports, has_opened, strict=True):
            each._end_threads(self, bool(must_close))  # noqa: SLF001
        self.barrier()
        for each in transports:
            mark_closed(each)
            del each._group, each._groups  # noqa: SLF001 - optimizers may refer to the transport for longer
            each._short_messages = None  # noqa: SLF001
        if self._owns_default_group and dist.is_initialized():
            dist.destroy_process_group()

    def _end_threads(self, parent: "TorchTransport", has_opened_short_messages: bool) -> None:
        if has_opened_short_messages:
            self._opened_short_messages().close()
        self._threads.end()
        end_unmatched(
            parent,
            self._threads,
            lambda peer, tag: self._start([(peer, np.zeros(1, np.uint8))], [], tag),
            lambda peer, tag, nbytes: self._start([], [(peer, np.empty(nbytes, np.uint8))], tag),
        )

    def _finish(self, start: Callable[[], Work]) -> None:
        """Start a collective, and wait until it is complete."""
        with TranslatedErrors():
            work = start()
            if self._pause is not None:
                while not work.is_completed():
                    self._pause()
            work.wait()


class BackgroundTorchTransport(TorchTransport):
    """The same ranks on another group, for one thread that communicates while the main thread computes.

    It polls, so that its waits can be paced and ended. Implements ``Interruptible`` and ``YieldsCPU``.
    """

    closed = False
    yields_cpu = True
    while_waiting: Callable[[], None] | None = None

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups)
        self._pause = self._sleep_or_end

    def _sleep_or_end(self) -> None:
        if self.closed:
            raise TransportError("the transport was closed while a thread was communicating over it")
        if self.while_waiting is not None:
            self.while_waiting()
        else:
            time.sleep(POLL_SECONDS)


def _tensor(array: Array) -> torch.Tensor:
    """Return a tensor that refers to the memory of an array."""
    if not array.flags.writeable:
        raise TransportError("an operation that writes to a read-only array: give it a copy")
    return torch.from_numpy(array)


def _readable(array: Array) -> torch.Tensor:
    """Return a tensor with the content of an array: its memory, unless that is read-only, for which torch warns."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _node_identity() -> bytes:
    """What ranks on the same node have in common: the running kernel, and the host's name in it (a container's)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except OSError:
        boot = ""
    return hashlib.blake2b(f"{os.uname().nodename}\0{boot}".encode(), digest_size=16).digest()
