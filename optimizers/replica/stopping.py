"""Stopping when told to: all ranks save at the same step, and end with a status by which they can be started again.

A batch system that wants the machines back sends SIGTERM, to all ranks or to some, never at the same instant. The
handler only makes a note, which travels with the control message that ranks exchange anyway, so that all know of it
after the same message, and save after the same step. Python runs it between two lines of its own: a rank that waits
inside MPI hears of the signal when that returns. Nobody waits because of it, so MPI does return; if another rank has
brought the note meanwhile, nothing is missing.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from lentando.comm.capabilities import VirtualTime
from lentando.comm.elastic import transaction
from lentando.comm.errors import ConfigurationError, MismatchError, grouped_by_rank, ranks_in_words
from lentando.comm.objects import allgather_object

if TYPE_CHECKING:
    from lentando.optimizers.replica import Replica

__all__ = ["LOOK_STEPS", "SAVED_STATUS", "SaveOnSignal", "StopHandle"]

_log = logging.getLogger("lentando")

SAVED_STATUS = 85
"""Exit status of ranks that have saved because they were told to stop: start the job again.

HTCondor's for a job that has made its checkpoint, and ERESTART of errno.h. Not 143, by which a shell tells of whoever
was killed by SIGTERM and has saved nothing, and not 75, the status of a job that stalled.
"""
LOOK_STEPS = 16
"""Inner steps between the messages that carry the note where no other does."""


class StopHandle(AbstractContextManager["StopHandle"], Protocol):
    """What a user has of ``SaveOnSignal``. As a block, it is closed at the end."""

    def check(self) -> None:
        """Save and end this rank, if the ranks have agreed to: collective then, as they all come here at the same step.

        Raises:
            SystemExit: with ``SAVED_STATUS``.
            CheckpointError: on every rank, if one of them could not save.
        """

    def close(self) -> None:
        """Handle the signals as before again. Every rank does so at the same step."""


class SaveOnSignal:
    """Saves all ranks and ends them after one has received a signal. Collective: made on every rank.

    Implements ``StopHandle``.

    Args:
        replica: that trains.
        save: saves, with what is given to it as the user's ``extra``; returns where.
        extra: for ``save``; called if it can be, when that is done.
        signals: that tell a rank to stop.
        every: inner steps between messages that are sent for nothing else; None for none where others carry the note.
        automatic: act at the end of an optimizer's step; False leaves it to ``check``.

    Raises:
        ConfigurationError: for settings that cannot work, outside the main thread, or in a simulation.
        MismatchError: on every rank, if the ranks do not do so alike.

    Attributes:
        every: as given, or as found.
        automatic: as given.
    """

    def __init__(
        self,
        replica: "Replica",
        save: Callable[[Any], Path],
        extra: Any,
        signals: Sequence[int],
        every: int | None,
        automatic: bool,
    ) -> None:
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ConfigurationError(f"every must be an integer >= 1 (inner steps) or None, got {every!r}")
        transport, _, settings = replica.parts
        if isinstance(transport, VirtualTime):
            raise ConfigurationError("simulated ranks share a process, to which signals are sent: leave this out there")
        if settings.base.averages_gradients:
            every = None  # there is a message in every step
        elif every is None and (settings.period is None or not settings.exact_average):
            every = LOOK_STEPS
        self.every = every
        self.automatic = automatic
        self._agreed: list[int] = []
        self._has_warned = False
        self._replica = replica
        self._save = save
        self._extra = extra
        self._told = False
        self._process = os.getpid()
        names = [signal.Signals(number).name for number in signals]
        replica.expect_stop(self)
        own = f"save_on_signal({', '.join(names)}; {every=}, {automatic=})"
        described = transaction(transport, lambda: allgather_object(transport, own))
        if len(set(described)) > 1:
            raise MismatchError(f"the ranks do not save on signals alike: {grouped_by_rank(described)}")
        self._previous: dict[int, Any] = {}
        _handling.add(self)
        try:
            for number in signals:
                previous = signal.signal(number, self._on_signal)
                self._previous[number] = signal.SIG_DFL if previous is None else previous
        except (ValueError, OSError) as error:
            self.close()
            raise ConfigurationError(
                f"signals can be handled in the main thread alone, and not all ({error})"
            ) from error

    @property
    def told(self) -> bool:
        """Whether this rank was told to stop; what it tells the others."""
        return self._told

    def agree(self, ranks: Sequence[int]) -> None:
        """All ranks know now that these were told to stop, or that none was: who was may have died since."""
        if ranks and self._agreed and not self._has_warned and self._replica.parts[0].rank == 0:
            self._has_warned = True
            _log.warning(
                "%s: told to stop, all ranks know it, and nothing has saved them since. From a graph nothing can: give "
                "fit() what save_on_signal returned, in callbacks=[...], or call its check() after each step",
                ranks_in_words(ranks),
            )
        self._agreed = list(ranks)

    def check(self) -> None:
        if not self._agreed:
            return
        told, self._agreed = self._agreed, []
        folder = self._save(self._extra() if callable(self._extra) else self._extra)
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)  # all that is left to do is to leave the job together
        transport, _, _ = self._replica.parts
        if transport.rank == 0:
            sys.stderr.write(
                f"Lentando: {ranks_in_words(told)} of {transport.size} {'was' if len(told) == 1 else 'were'} told to "
                f"stop: saved to {folder} after inner step {self._replica.inner_steps}, ending with status "
                f"{SAVED_STATUS}\n"
            )
            sys.stderr.flush()
        raise SystemExit(SAVED_STATUS)

    def handled(self) -> list[int]:
        """The signals that come here."""
        return [number for number in self._previous if signal.getsignal(number) == self._on_signal]

    def restore(self) -> None:
        """Handle these signals as before, in this process."""
        for number in self.handled():
            signal.signal(number, self._previous[number])

    def close(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
        self._replica.expect_no_stop()

    def __enter__(self) -> "SaveOnSignal":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # One that ends as agreed goes on ignoring signals, or another one would end it before the rest.
        if not isinstance(error, SystemExit) or error.code != SAVED_STATUS:
            self.close()

    def _on_signal(self, number: int, _: object) -> None:
        """Make a note. The second signal finds what handled it before: by default, it ends the process at once."""
        if os.getpid() != self._process:  # not seen by ``_restore_in_child``
            self.restore()
            signal.raise_signal(number)
            return
        self._told = True
        signal.signal(number, self._previous[number])
        transport, _, _ = self._replica.parts
        text = (
            f"Lentando: rank {transport.rank} has received {signal.Signals(number).name}: all ranks save and end when "
            "they next communicate. Once more, and this one ends at once, unsaved\n"
        )
        os.write(2, text.encode())  # not through a stream that may be in the middle of writing


_handling: WeakSet[SaveOnSignal] = WeakSet()
_masks: list[set[int]] = []


def _block_before_fork() -> None:
    """Python forgets what arrives in a child before it has cleared what its parent was sent: let it wait until then."""
    numbers = {number for stop in _handling for number in stop.handled()}
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, numbers))


def _unblock_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _restore_in_child() -> None:
    """A process that a rank has made by fork is no rank: signals do to it what they did before."""
    for stop in list(_handling):
        stop.restore()
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


os.register_at_fork(before=_block_before_fork, after_in_parent=_unblock_in_parent, after_in_child=_restore_in_child)
