"""Parameters that are frozen, unfrozen, added or removed while a replica trains.

Ranks notice it where they communicate, and then lay their flat buffers out again together: what was trained before and
still is keeps its value, its anchor, its slow momentum and its push-sum state. Parameters that join begin with the mean
of the ranks, which may have trained them for the rest of a round already, and without slow momentum; with rank 0's
values where gradients are averaged, or if the replica did not know of them. Those that leave get the mean too, so that
they are equal on all ranks.
"""

import logging
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np

from lentando.comm.array_module import copy_into, to_host
from lentando.comm.control import Event, fingerprint
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer, FlatLayout, describe
from lentando.comm.transport import Array, as_bytes
from lentando.optimizers.framework import ChangingFramework, CoveringFramework
from lentando.optimizers.replica.last_look import LastLook
from lentando.optimizers.replica.messages import Messages
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rest_of_model import take_over
from lentando.optimizers.replica.same_model import check_equal_hyperparameters
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.rules.base_buffers import average
from lentando.optimizers.rules.flat_state import carried_over

__all__ = ["Change", "TrainedParameters"]

_log = logging.getLogger("lentando")

NAMES = 5
"""How many parameters a message names."""


@dataclass(frozen=True)
class Change:
    """What has changed on this rank.

    Attributes:
        joined: names of parameters that are trained now and were not.
        left: names of parameters that are no longer trained.
        replaced: names that stand for other parameters than before: these have joined, and their predecessors left.
        subject: what travels with a control message, so that ranks that differ notice it.
    """

    joined: Sequence[str]
    left: Sequence[str]
    replaced: Set[str]
    subject: int

    def __str__(self) -> str:
        """In words, for a message."""
        said = [
            f"{', '.join(map(repr, names[:NAMES]))}{' and others' if len(names) > NAMES else ''} {what}"
            for names, what in ((self.joined, "trained from now on"), (self.left, "no longer trained"))
            if names
        ]
        return " and ".join(said) or "other parameter groups, or buffers of other shapes"


@dataclass
class TrainedParameters:
    """Follows the changes of which parameters a replica trains.

    Args:
        plan: what the replica is made of.
        progress: how far it is.
        messages: compare what the ranks do.
        timing: does not count the time that a change takes.
        last_look: looks at the buffers that there are at the end.
    """

    plan: Plan
    progress: Progress
    messages: Messages
    timing: Timing
    last_look: LastLook
    _named: set[str] = field(default_factory=set, init=False)  # in a warning
    _changing: ChangingFramework | None = field(init=False)

    def __post_init__(self) -> None:
        # Asked once: looking through a protocol takes longer than the rest of a small step.
        framework = self.plan.framework
        self._changing = framework if isinstance(framework, ChangingFramework) else None

    def pending(self) -> Change | None:
        """What has changed on this rank since the buffers were laid out, None if nothing has."""
        framework = self._changing
        if framework is None or not framework.has_changed():
            return None
        if is_elastic(self.plan.transport):
            raise ConfigurationError(
                "in an elastic job (init(elastic=True)), parameters cannot be frozen, unfrozen, added or removed after "
                "the optimizer was wrapped yet: do so before wrapping"
            )
        after = framework.next_layouts()
        replaced = framework.replaced()
        before, now = (set(_parameters(layouts)) - replaced for layouts in (self._layouts(), after))
        return Change(
            [name for name in _parameters(after) if name not in before],
            [name for name in _parameters(self._layouts()) if name not in now],
            replaced,
            fingerprint(["change", describe(after), sorted(replaced)]),
        )

    def follow(self) -> None:
        """Train what the model and the optimizer now ask to be trained. Collective if something has changed.

        Raises:
            MismatchError: on every rank, if it has not changed alike on all ranks.
            ConfigurationError: if nothing is left to be trained, or in an elastic job.
        """
        change = self.pending()
        if change is not None:
            self.messages.agree(Event.CHANGE, "changes which parameters it trains in", change=change)
            self._adopt(change)

    def _adopt(self, change: Change) -> None:
        """Lay the buffers out again, all ranks having agreed to. Collective."""
        plan = self.plan
        framework = plan.framework
        assert isinstance(framework, ChangingFramework)
        check_equal_hyperparameters(plan.transport, framework)
        self.timing.pause()
        plan.wait_in_flight()
        before = [_renamed(layout, change.replaced) for layout in self._layouts()]
        known = framework.known - change.replaced
        base_state = plan.base.state.state_dict()
        outer_state = None if plan.outer is None else plan.outer.whole_state()
        prepared = None
        if change.left:
            parameters = [to_host(buffer.parameters) for buffer in framework.buffers]
            prepared = plan.base.resizing.prepared_average(base_state, parameters)
        by_mean = not plan.settings.base.averages_gradients
        self._unify(framework.buffers, change.left, by_mean, prepared)
        framework.store()
        framework.change_layout()
        framework.load()
        joined = set(change.joined)
        self._unify(framework.buffers, joined & known, by_mean)
        self._unify(framework.buffers, joined - known, by_mean=False)
        framework.store()
        self._share_new_frozen(known)
        plan.plan_again()
        self.last_look.buffers = framework.buffers
        self._carry_base_state_over(base_state, before)
        if plan.outer is not None and outer_state is not None:
            plan.outer.load_state_dict(carried_over(outer_state, plan.outer.state_dict(), before, self._layouts()))
        self._carry_rates_over(before)
        if plan.transport.rank == 0:
            _log.info("after inner step %d: %s", self.progress.inner_steps, change)
        self.timing.resume()

    def warn_of_left_out(self) -> None:
        """Say so, once of each, if the model has trainable parameters that no wrapped optimizer has.

        Asked before the first step and where the average is evaluated: a program may have put other parameters into the
        model meanwhile (``load_state_dict(assign=True)``, another head).
        """
        framework = self.plan.framework
        if not isinstance(framework, CoveringFramework) or self.plan.transport.rank != 0:
            return
        names = [name for name in framework.left_out() if name not in self._named]
        self._named.update(names)
        if names:
            _log.warning(
                "%d trainable parameters of the model given as model= are in no wrapped optimizer, so they are never "
                "averaged: %s%s. Give them to the optimizer, or freeze them",
                len(names),
                ", ".join(map(repr, names[:NAMES])),
                ", ..." if len(names) > NAMES else "",
            )

    def _layouts(self) -> list[FlatLayout]:
        return [buffer.layout for buffer in self.plan.framework.buffers]

    def _carry_base_state_over(self, state: dict[str, object], before: Sequence[FlatLayout]) -> None:
        plan = self.plan
        base, after = plan.base, self._layouts()
        base.state.load_state_dict(carried_over(state, base.state.state_dict(), before, after))
        # Once more, when what has joined has been brought in line with the rest (x = w z, with this rank's w).
        plan.framework.load()
        base.outer_average.rebase_on_model()
        base.state.load_state_dict(carried_over(state, base.state.state_dict(), before, after))

    def _carry_rates_over(self, before: Sequence[FlatLayout]) -> None:
        """Groups of parameters that were there keep the learning rates of the round so far; others have today's."""
        progress = self.progress
        group_before = {entry.name: entry.group for layout in before for entry in layout.entries}
        sums = [rate * progress.steps for rate in self.plan.framework.learning_rates()]
        for layout in self._layouts():
            for entry in layout.entries:
                group = group_before.get(entry.name)
                if entry.group is not None and group is not None and group < len(progress.rate_sums):
                    sums[entry.group] = progress.rate_sums[group]
        progress.rate_sums = sums

    def _share_new_frozen(self, known: Set[str]) -> None:
        """Tensors that are not averaged and that the replica did not know of: rank 0's, on every rank."""
        framework = self.plan.framework
        added = {name: array for name, array in framework.not_averaged().items() if name not in known}
        framework.store_not_averaged(take_over(self.plan.transport, framework.name, added))

    def _unify(
        self,
        buffers: Sequence[FlatBuffer],
        names: Iterable[str],
        by_mean: bool,
        values: Sequence[Array] | None = None,
    ) -> None:
        """Make parameters equal on all ranks; those that are keep every bit.

        Args:
            buffers: hold them.
            names: of these parameters.
            by_mean: the mean of the ranks, or rank 0's.
            values: of the buffers' parameters, if not what they hold.
        """
        transport, wanted = self.plan.transport, set(names)
        places: dict[str, Array] = {}
        arrays: dict[str, Array] = {}
        for number, buffer in enumerate(buffers):
            for entry, offset in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
                if entry.name in wanted:
                    part = slice(offset, offset + entry.size)
                    places[entry.name] = buffer.array[part]
                    source = buffer.array if values is None else values[number]
                    arrays[entry.name] = np.array(to_host(source[part])).astype(buffer.array.dtype, copy=False)
        if not arrays:
            return
        checksum = 0
        for array in arrays.values():
            checksum = crc32(as_bytes(array).data, checksum)
        if len(set(transport.allgather(np.array([checksum], np.int64))[:, 0].tolist())) > 1:
            if by_mean:
                arrays = average(transport, arrays, self.plan.settings.algorithm)
            else:
                for array in arrays.values():
                    transport.broadcast(array)
        for name, array in arrays.items():
            copy_into(places[name], array)


def _renamed(layout: FlatLayout, names: Set[str]) -> FlatLayout:
    """The layout with other names in place of these, so that nothing is carried over from them by name."""
    return FlatLayout(
        [replace(entry, name=f"{entry.name} (before)") if entry.name in names else entry for entry in layout.entries]
    )


def _parameters(layouts: Iterable[FlatLayout]) -> list[str]:
    return [entry.name for layout in layouts for entry in layout.entries if entry.group is not None]
