"""Parameters that are frozen, unfrozen, added or removed while a replica trains.

Each rank checks for such changes when it communicates, and then all lay out their flat buffers again together.
Parameters that were trained before and still are keep their values, anchors, slow momenta and push-sum states.
Parameters that join begin without slow momentum and with the mean of the ranks, which may have trained them for the
rest of a round already; or with rank 0's values if gradients are averaged, or if the parameters are new to the replica.
Parameters that leave get the mean too, so that they are equal on all ranks.
"""

import logging
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from lentando.comm.agreement import Event, fingerprint
from lentando.comm.array_module import copy_into, to_host
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer, FlatLayout, describe
from lentando.comm.transport import Array, as_bytes
from lentando.optimizers.framework import ChangingFramework, CoveringFramework
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.equal_start import check_equal_hyperparameters, share_not_averaged
from lentando.optimizers.replica.last_look import LastLook
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.rules.base_buffers import average
from lentando.optimizers.rules.flat_state import carried_over

__all__ = ["Change", "TrainedParameters"]

_log = logging.getLogger("lentando")

NAMES = 5
"""Number of parameters that a message names."""


@dataclass(frozen=True)
class Change:
    """A change of which parameters this rank trains.

    Attributes:
        joined: names of parameters that are trained now and were not trained before.
        left: names of parameters that are no longer trained.
        replaced: names that stand for other parameters than before: these have joined, and their predecessors left.
        subject: fingerprint that is sent with a control message, so that a difference between ranks is an error.
    """

    joined: Sequence[str]
    left: Sequence[str]
    replaced: Set[str]
    subject: int

    def __str__(self) -> str:
        """Describe the change for a message."""
        parts = [
            f"{', '.join(map(repr, names[:NAMES]))}{' and others' if len(names) > NAMES else ''} {state}"
            for names, state in ((self.joined, "trained from now on"), (self.left, "no longer trained"))
            if names
        ]
        return " and ".join(parts) or "other parameter groups, or buffers of other shapes"


class TrainedParameters:
    """Follows the changes of which parameters a replica trains.

    Args:
        setup: transport, framework and method of the replica.
        progress: progress of the replica.
        channel: sends the control messages.
        timing: does not count the time that a change takes.
        last_look: check at the end of training, which needs the new buffers.

    Attributes:
        have_changed: returns whether something has changed on this rank since the buffers were laid out.
    """

    def __init__(self, setup: Setup, progress: Progress, channel: Channel, timing: Timing, last_look: LastLook) -> None:
        self._setup = setup
        self._progress = progress
        self._channel = channel
        self._timing = timing
        self._last_look = last_look
        self._named: set[str] = set()  # in a warning
        # Checked once: isinstance with a protocol takes longer than the rest of a small step.
        framework = setup.framework
        self.have_changed: Callable[[], bool] = (
            framework.has_changed if isinstance(framework, ChangingFramework) else lambda: False
        )

    def pending(self) -> Change | None:
        """Return what has changed on this rank since the buffers were laid out, None if nothing has."""
        if not self.have_changed():
            return None
        framework = self._setup.framework
        assert isinstance(framework, ChangingFramework)
        if is_elastic(self._setup.transport):
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
            self._channel.agree(
                Event.CHANGE,
                "changes which parameters it trains in",
                subject=change.subject,
                details=f", with {change}",
            )
            self._adopt(change)

    def _adopt(self, change: Change) -> None:
        """Lay out the buffers again, after all ranks have agreed to. Collective."""
        setup = self._setup
        framework = setup.framework
        assert isinstance(framework, ChangingFramework)
        check_equal_hyperparameters(setup.transport, framework)
        self._timing.pause()
        setup.wait_in_flight()
        setup.adopt_in_flight()
        before = [_renamed(layout, change.replaced) for layout in self._layouts()]
        known = framework.known - change.replaced
        base_state = setup.base.state.state_dict()
        outer_state = None if setup.outer is None else setup.outer.whole_state()
        left_values = None
        if change.left:
            parameters = [to_host(buffer.parameters) for buffer in framework.buffers]
            left_values = setup.base.resizing.prepared_average(base_state, parameters)
        by_mean = not setup.settings.base.averages_gradients
        self._unify(framework.buffers, change.left, by_mean, left_values)
        framework.store()
        framework.change_layout()
        framework.load()
        joined = set(change.joined)
        self._unify(framework.buffers, joined & known, by_mean)
        self._unify(framework.buffers, joined - known, by_mean=False)
        framework.store()
        self._share_new_frozen(known)
        setup.plan_again()
        self._last_look.buffers = framework.buffers
        self._carry_base_state_over(base_state, before)
        if setup.outer is not None and outer_state is not None:
            setup.outer.load_state_dict(carried_over(outer_state, setup.outer.state_dict(), before, self._layouts()))
        self._carry_rates_over(before)
        if setup.transport.rank == 0:
            _log.info("after inner step %d: %s", self._progress.inner_steps, change)
        self._timing.resume()

    def warn_of_left_out(self) -> None:
        """Warn, once for each, of trainable parameters of the model that no wrapped optimizer has.

        Called before the first step and before the average is evaluated: a program may have put other parameters into
        the model meanwhile (``load_state_dict(assign=True)``, another head).
        """
        framework = self._setup.framework
        if not isinstance(framework, CoveringFramework) or self._setup.transport.rank != 0:
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
        return [buffer.layout for buffer in self._setup.framework.buffers]

    def _carry_base_state_over(self, state: dict[str, object], before: Sequence[FlatLayout]) -> None:
        setup = self._setup
        base, after = setup.base, self._layouts()
        base.state.load_state_dict(carried_over(state, base.state.state_dict(), before, after))
        # Again, after the parameters that have joined were made consistent with the rest (x = w z, with this rank's w).
        setup.framework.load()
        base.outer_average.rebase_on_model()
        base.state.load_state_dict(carried_over(state, base.state.state_dict(), before, after))

    def _carry_rates_over(self, before: Sequence[FlatLayout]) -> None:
        """Keep the round's learning rates of parameter groups that existed; new groups get their present rates."""
        progress = self._progress
        group_before = {entry.name: entry.group for layout in before for entry in layout.entries}
        sums = [rate * progress.steps for rate in self._setup.framework.learning_rates()]
        for layout in self._layouts():
            for entry in layout.entries:
                group = group_before.get(entry.name)
                if entry.group is not None and group is not None and group < len(progress.rate_sums):
                    sums[entry.group] = progress.rate_sums[group]
        progress.rate_sums = sums

    def _share_new_frozen(self, known: Set[str]) -> None:
        """Adopt rank 0's values of new tensors that are not averaged. Collective."""
        framework = self._setup.framework
        added = {name: array for name, array in framework.not_averaged().items() if name not in known}
        framework.store_not_averaged(share_not_averaged(self._setup.transport, framework.name, added))

    def _unify(
        self,
        buffers: Sequence[FlatBuffer],
        names: Iterable[str],
        by_mean: bool,
        values: Sequence[Array] | None = None,
    ) -> None:
        """Make parameters equal on all ranks; parameters that are equal already stay bit-identical.

        Args:
            buffers: flat buffers that hold the parameters.
            names: names of the parameters.
            by_mean: whether they become the mean of the ranks, or rank 0's values.
            values: values to use in place of those in the buffers, one array per buffer.
        """
        transport, wanted = self._setup.transport, set(names)
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
                arrays = average(transport, arrays, self._setup.settings.algorithm)
            else:
                for array in arrays.values():
                    transport.broadcast(array)
        for name, array in arrays.items():
            copy_into(places[name], array)


def _renamed(layout: FlatLayout, names: Set[str]) -> FlatLayout:
    """Return the layout with these parameters renamed, so that nothing is carried over from them by name."""
    return FlatLayout(
        [replace(entry, name=f"{entry.name} (before)") if entry.name in names else entry for entry in layout.entries]
    )


def _parameters(layouts: Iterable[FlatLayout]) -> list[str]:
    return [entry.name for layout in layouts for entry in layout.entries if entry.group is not None]
