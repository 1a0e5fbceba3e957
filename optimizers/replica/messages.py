"""What a replica tells the others, in a control message before data move, and what it learns of them."""

import re
from collections.abc import Callable, Sequence
from math import nan
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

from lentando.comm.array_module import to_host
from lentando.comm.control import Agreement, Control, Event, agree, fingerprint
from lentando.comm.elastic import is_elastic, transaction
from lentando.comm.errors import MismatchError
from lentando.comm.transport import Transport, as_bytes
from lentando.optimizers.fixed_state import fixed_state_of
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rank_comparison import RankComparison, weighted_rate
from lentando.optimizers.replica.stopping import SaveOnSignal
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.rules.non_finite import NonFinite

if TYPE_CHECKING:
    from lentando.optimizers.replica.trained_parameters import Change

__all__ = ["Messages"]

T = TypeVar("T")

JOINED = fingerprint("inside a join block")
"""Makes the subject of a message another one, so that ranks inside the block and outside it do not mistake theirs."""

STARTED = "started from parameters with checksum"
"""Precedes the checksum in what a rank says that it does."""

DIFFERENT_START = (
    "The parameters differed between ranks when the first step was taken. Either they were loaded or set after the "
    "optimizer was wrapped, and not on every rank; or the first forward pass changed them in place, on each rank by "
    "its own batch, as torch.nn.Embedding(max_norm=...) does. In the latter case bring all rows a little below the "
    "bound (torch.renorm), on every rank, before the optimizer is wrapped. Where every step averages gradients and "
    "there are no outer steps, do so after each step in place of max_norm, which would keep the replicas apart"
)

_replicas: WeakKeyDictionary[Transport, int] = WeakKeyDictionary()
"""How many replicas each job has had. All ranks make them in the same order."""


class Messages:
    """The control messages of one replica.

    Args:
        plan: what the replica is made of.
        progress: how far it is.
        timing: tells the others about this rank's times, and hears about theirs.
        non_finite: tells whether this rank's values are finite.

    Attributes:
        stop: asks in every message whether a rank was told to stop, None if nobody asks.
    """

    def __init__(self, plan: Plan, progress: Progress, timing: Timing, non_finite: NonFinite) -> None:
        self.stop: SaveOnSignal | None = None
        self._plan = plan
        self._progress = progress
        self._timing = timing
        self._non_finite = non_finite
        self._start_checksum = 0
        # Models of equal layout, such as those of a GAN, would otherwise be averaged with each other where ranks take
        # their steps in another order.
        _replicas[plan.transport] = self._number = _replicas.get(plan.transport, 0) + 1
        self._identity = fingerprint(["replica", self._number])
        self._comparison = RankComparison(plan.transport.rank, plan.settings.rates_may_differ)

    def expect_start(self) -> None:
        """Training starts from the parameters of now: the first message checks that all ranks have the same.

        Statistics have already moved in the forward pass.
        """
        for buffer in self._plan.framework.buffers:
            for part in buffer.layout.ranges:
                if part.group is not None:
                    elements = to_host(buffer.array[part.start : part.stop])
                    self._start_checksum = crc32(as_bytes(elements).data, self._start_checksum)
        if state := fixed_state_of(self._plan.framework):
            values = [sorted(part.items()) for _, part in state]  # names of layers may differ
            self._start_checksum = crc32(repr(values).encode(), self._start_checksum)

    def forget_start(self) -> None:
        """It has been compared, or is another one."""
        self._start_checksum = 0

    def agree(
        self,
        event: Event,
        doing: str,
        loss: float = nan,
        flag: bool = False,
        rates: Sequence[float] | None = None,
        is_active: bool | None = None,
        found: str | None = None,
        change: "Change | None" = None,
    ) -> Agreement:
        """Send a control message.

        Args:
            event: see ``Control``, like every argument that is not listed here.
            doing: that in words.
            loss: see there.
            flag: see there.
            rates: learning rates that the message is about, by parameter group; by default those of the last step.
            is_active: whether this rank counts; by default, unless it has no batch left.
            found: its values that are not finite.
            change: of which parameters this rank trains; must be the same on all ranks.

        Raises:
            MismatchError: on every rank, if the ranks are not about to do the same.
        """
        transport, progress = self._plan.transport, self._progress
        checksum = self._start_checksum
        about = self._plan.subject ^ self._identity ^ checksum
        if not is_elastic(transport):  # where the message may be repeated, with ranks that have not sent it yet
            self.forget_start()
        step = progress.inner_steps
        if change is not None:
            about ^= change.subject
        if progress.is_joined:
            about ^= JOINED
            if event is Event.ROUND:
                step -= progress.steps  # where the round began: ranks may have taken unequally many steps in it
        rates = progress.latest_rates if rates is None else rates
        is_compared = bool(rates) and not progress.is_joined  # where ranks may have taken unequally many steps
        started = transport.clock()
        control = Control(
            event,
            progress.rounds,
            step,
            about,
            loss,
            weight=float(not progress.has_ended if is_active is None else is_active),
            learning_rate=sum(rates) / len(rates) if rates else nan,
            weighted_rate=weighted_rate(rates) if is_compared else nan,
            flag=flag,
            clock=progress.seconds(),
            finite=self._non_finite.is_clean(found),
            stopping=self.stop is not None and self.stop.told,
            early=self._plan.base.overlap.coverage,
            weights_set=event in (Event.GRADIENTS, Event.ROUND) and self._plan.framework.watch.found,
            **self._timing.shares(),
        )

        def words() -> str:
            since = f"{STARTED} {checksum:08x}" if checksum else f"{progress.rounds} rounds"
            where = " inside join" if progress.is_joined else ""
            where = " with the others, having run out of its own batches," if progress.has_ended else where
            trained = "" if change is None else f", with {change}"
            which = "" if _replicas[transport] == 1 else f" (optimizer {self._number} of this job)"
            return f"{doing} its model{where}{trained}, after {progress.inner_steps} steps and {since}{which}"

        try:
            agreement = agree(transport, control, words)
        except MismatchError as error:
            if len(set(re.findall(rf"{STARTED} (\w+)", str(error)))) < 2:
                raise
            raise MismatchError(f"{error}. {DIFFERENT_START}") from None
        self._comparison.look(agreement, progress.inner_steps, progress.steps if event is Event.ROUND else 1)
        if self.stop is not None:
            self.stop.agree(agreement.stopping)
        self._timing.heard(agreement, transport.clock() - started)
        return agreement

    def together(self, attempt: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
        """Do something with all ranks that begins with a message; see ``lentando.comm.elastic.transaction``."""
        result = transaction(self._plan.transport, attempt, undo)
        self.forget_start()
        return result

    def look_for_stop(self, doing: str) -> None:
        """Ask whether a rank was told to stop, and nothing else. Collective."""
        transaction(self._plan.transport, lambda: self.agree(Event.STOP, doing))

    def stop_if_agreed(self, automatic: bool) -> None:
        """Between steps: do what the ranks have agreed to when one was told to stop.

        Args:
            automatic: nobody has asked to do so here.
        """
        if self.stop is not None and (self.stop.automatic or not automatic):
            self.stop.check()
