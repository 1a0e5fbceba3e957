"""Ends the job together with this process: an exception aborts it, and the normal end of the program leaves it."""

import atexit
import io
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from lentando.comm.closed import is_closed
from lentando.comm.errors import LentandoError
from lentando.comm.transport import Transport

__all__ = ["ProcessEnd", "process_end"]

FAILURE_GRACE_SECONDS = 3.0
"""Time that the other ranks have to report the same failure before a failed rank aborts the job. On cores that many
processes share, a traceback alone may take a second."""


class ProcessEnd:
    """Hooks that run when this process ends. They do nothing in a forked child, and until they are installed.

    Attributes:
        is_installed: whether the hooks are in place.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._has_exit_thread = False
        self.is_installed = False

    def install(self, joined: Callable[[], Transport | None], shutdown: Callable[[], object]) -> None:
        """Install the hooks. A second call has no effect.

        Args:
            joined: returns the transport of the job that the process belongs to, None outside a job.
            shutdown: leaves the job.
        """
        if self.is_installed:
            return
        self.is_installed = True
        self._joined, self._shutdown = joined, shutdown
        self._pid = os.getpid()
        self._report = sys.excepthook
        sys.excepthook = self._on_exception
        atexit.register(self._on_exit)

    def run_before_horovod(self) -> None:
        """Leave the job before Horovod ends, although ``hvd.init()`` registers that with ``atexit`` as well.

        The interpreter waits for threads before it calls the ``atexit`` functions, the last registered one first.
        """
        if not self._has_exit_thread:
            self._has_exit_thread = True
            threading.Thread(target=self._register_when_main_ends, name="lentando-exit").start()

    def _register_when_main_ends(self) -> None:
        threading.main_thread().join()
        atexit.register(self._on_exit)

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Report the exception as usual, then abort the job: the other ranks would wait for this rank forever."""
        self._report(kind, error, trace)
        joined = self._joined()
        if os.getpid() == self._pid and joined is not None and joined.size > 1 and not is_closed(joined):
            sys.stderr.write(f"Lentando: rank {joined.rank} failed ({kind.__name__}) and ends the job\n")
            _flush_stderr()
            time.sleep(FAILURE_GRACE_SECONDS)
            joined.abort(1)

    def _on_exit(self) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._shutdown()
        except LentandoError as error:
            self._on_exception(type(error), error, error.__traceback__)


def _flush_stderr() -> None:
    """Write what stderr holds, also where another hook collects it in memory until this one returns.

    torch.distributed.init_process_group puts such a hook around those that exist. This one does not return.
    """
    if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:
        sys.__stderr__.write(sys.stderr.getvalue())
        sys.__stderr__.flush()
    sys.stderr.flush()


process_end = ProcessEnd()
"""The hooks of this process."""
