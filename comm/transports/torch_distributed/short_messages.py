"""Short messages of any length that arrive although their receiver does not wait for them: of threads, and notices.

A thread of each rank receives them.
"""

import struct
import threading
from collections import defaultdict, deque

import torch

from lentando.comm.errors import TransportError
from lentando.comm.transports.torch_distributed.errors import TranslatedErrors, translated
from lentando.comm.transports.torch_distributed.groups import GlooGroup
from lentando.comm.transports.torch_distributed.waiting import MessageInFlight, WaitingThreads

__all__ = ["PROBE_SECONDS", "ShortMessages"]

_HEADER = struct.Struct("<qqq")
"""The sender of a message, its kind, and the length of its content in bytes."""
_NOTICE, _CONTENT, _PROBE, _END = range(4)

PROBE_SECONDS = 1.0
"""Interval at which a thread that waits for short messages checks that the other ranks are alive."""


class ShortMessages:
    """The short messages that one rank sends and receives over a group. All of its ranks open and close it.

    Args:
        group: group of the ranks.
        rank, size: number of this rank, and of all ranks.
        tag: tag that no other messages have; the next one is used as well.
        threads: keep what is sent until it has been received.
    """

    def __init__(self, group: GlooGroup, rank: int, size: int, tag: int, threads: WaitingThreads) -> None:
        self._group, self._tag = group, tag
        self._rank, self._size = rank, size
        self.changed = threading.Condition()
        self._failure: TransportError | None = None
        self._contents: deque[tuple[int, bytes]] = deque()
        self._notices: defaultdict[int, deque[int]] = defaultdict(deque)
        self._threads = threads
        self._open = {peer for peer in range(size) if peer != rank}  # whose last message has not arrived
        self._receiver = threading.Thread(target=self._receive_all, name="lentando-receiving", daemon=True)
        self._receiver.start()

    def send_content(self, peer: int, content: bytes) -> None:
        """Send bytes to another rank, without waiting."""
        self._send(peer, _CONTENT, content)

    def receive_content(self) -> tuple[int, bytes] | None:
        """The sender and content of the next message that has arrived, None if there is none."""
        with self.changed:
            if self._contents:
                return self._contents.popleft()
            self._raise_failure()
            return None

    def probe(self) -> None:
        """Send each rank that may still send a message without effect. Raises ``TransportError`` if one has died.

        A thread that receives messages of any rank is not informed of the death of one.
        """
        for peer in tuple(self._open):
            self._send(peer, _PROBE, b"")

    def leave_notice(self, peer: int, number: int) -> None:
        """Send a number to another rank, without waiting."""
        self._send(peer, _NOTICE, struct.pack("<q", number))

    def read_notice(self, peer: int) -> int | None:
        """The next number of another rank, None if none has arrived."""
        with self.changed:
            if self._notices[peer]:
                return self._notices[peer].popleft()
            self._raise_failure()
            return None

    def wait_for_notice(self, peer: int, seconds: float) -> None:
        """Wait until a number of another rank has arrived, for ``seconds`` at most."""
        with self.changed:
            self.changed.wait_for(lambda: self._notices[peer] or self._failure is not None, seconds)

    def close(self) -> None:
        """Return once all ranks have called it and all messages have arrived. ``TransportError`` if one has died."""
        for peer in range(self._size):
            if peer != self._rank:
                self._send(peer, _END, b"")
        while self._receiver.is_alive():
            self._receiver.join(PROBE_SECONDS)
            self.probe()

    def _send(self, peer: int, kind: int, content: bytes) -> None:
        parts = [_HEADER.pack(self._rank, kind, len(content)), content]
        with TranslatedErrors(peer):
            for tag, part in enumerate(filter(None, parts), self._tag):
                work = self._group.send([torch.frombuffer(bytearray(part), dtype=torch.uint8)], peer, tag)
                self._threads.keep([MessageInFlight(work, peer, is_sent=True, tag=tag, nbytes=len(part))])

    def _receive_all(self) -> None:
        try:
            while self._open:
                header = torch.empty(_HEADER.size, dtype=torch.uint8)
                self._group.recv_anysource([header], self._tag).wait()
                peer, kind, length = _HEADER.unpack(bytes(header.numpy()))
                content = torch.empty(length, dtype=torch.uint8)
                if length:
                    self._group.recv([content], peer, self._tag + 1).wait()
                if kind == _END:
                    self._open.remove(peer)
                with self.changed:
                    if kind == _NOTICE:
                        self._notices[peer].extend(struct.unpack("<q", bytes(content.numpy())))
                    elif kind == _CONTENT:
                        self._contents.append((peer, bytes(content.numpy())))
                    self.changed.notify_all()
        except RuntimeError as error:
            self._fail(error)

    def _fail(self, error: RuntimeError) -> None:
        with self.changed:
            self._failure = self._failure or translated(error)
            self.changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise TransportError(str(self._failure)) from self._failure
