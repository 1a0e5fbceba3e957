"""Messages between two ranks over MPI besides exchanges: the side channel, notices, and a look at what has arrived."""

import numpy as np
from mpi4py import MPI

from lentando.comm.transports.mpi.translated_errors import TranslatedErrors

__all__ = ["SideMessages"]

NOTICE_TAG = 32_768
"""Tag of notices, above all tags of ``exchange``."""


class SideMessages:
    """The part of ``MPITransport`` that implements ``SideChannel`` and ``Notices``. The attributes are set there."""

    _comm: MPI.Intracomm
    _translated_errors: TranslatedErrors

    def __init__(self) -> None:
        self._side_channel: MPI.Intracomm | None = None
        self._side_sends: list[MPI.Request] = []
        self._notices: list[MPI.Request] = []

    def open_side_channel(self) -> bool:
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE and self._side_channel is None:
            self._side_channel = self._comm.Dup()
        return self._side_channel is not None

    def send_nowait(self, peer: int, content: bytes) -> None:
        assert self._side_channel is not None
        with self._translated_errors:
            self._side_sends = [request for request in self._side_sends if not request.Test()]
            self._side_sends.append(self._side_channel.Isend((content, MPI.BYTE), peer))

    def receive_nowait(self) -> tuple[int, bytes] | None:
        assert self._side_channel is not None
        status = MPI.Status()
        with self._translated_errors:
            if not self._side_channel.Iprobe(status=status):
                return None
            content = bytearray(status.Get_count(MPI.BYTE))
            self._side_channel.Recv((content, MPI.BYTE), status.Get_source())
        return status.Get_source(), bytes(content)

    def has_sent_all(self) -> bool:
        with self._translated_errors:
            self._side_sends = [request for request in self._side_sends if not request.Test()]
        return not self._side_sends

    def leave_notice(self, peer: int, number: int) -> None:
        with self._translated_errors:
            self._notices = [request for request in self._notices if not request.Test()]
            self._notices.append(self._comm.Isend(np.array([number], np.int64), peer, NOTICE_TAG))

    def read_notice(self, peer: int) -> int | None:
        with self._translated_errors:
            return self.take_notice(peer) if self._comm.Iprobe(peer, NOTICE_TAG) else None

    def take_notice(self, peer: int) -> int:
        notice = np.zeros(1, np.int64)
        with self._translated_errors:
            self._comm.Recv(notice, peer, NOTICE_TAG)
        return int(notice[0])

    def next_message(self, tag: int, source: int | None) -> tuple[int, int] | None:
        """Source and bytes of the message that an exchange would receive next, None if none has arrived.

        Args:
            tag: tag of the message.
            source: rank that sends; None for any.
        """
        status = MPI.Status()
        with self._translated_errors:
            if not self._comm.Iprobe(MPI.ANY_SOURCE if source is None else source, tag, status):
                return None
        return status.Get_source(), status.Get_count(MPI.BYTE)
