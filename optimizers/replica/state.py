"""How far a replica is, and its state: all that decides the next step, to be saved and resumed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from math import isnan, nan
from typing import Any

from lentando.comm.agreement import fingerprint
from lentando.comm.elastic import without_vote
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import describe
from lentando.comm.transport import Array
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.rules.movement_penalty import NormHistory
from lentando.optimizers.rules.non_finite import loss_to_send
from lentando.optimizers.rules.period import Decision, Period
from lentando.optimizers.rules.settings_comparison import different_from
from lentando.optimizers.rules.streamed_step import StreamedOuterStep

__all__ = [
    "Progress",
    "check_state",
    "copied",
    "load_state",
    "mean_loss",
    "return_to_state",
    "state_of",
    "state_to_return_to",
]

STATE_VERSION = 3
"""Version of what ``state_of`` returns. Version 2 held a fingerprint of the settings in words."""


@dataclass
class Progress:
    """How far a replica is: in training, in its round, and in its own batches.

    Args:
        clock: returns the time in seconds.
        period: schedule of the outer steps; None if there are none.

    Attributes:
        inner_steps: optimizer steps taken; on uneven data, by the rank that took most of them in each round.
        rounds: outer steps taken.
        decisions: decisions of the period, oldest first.
        has_started: whether the very first step has begun.
        is_in_step: whether a step has begun that has not been taken yet.
        is_joined: whether the ranks may have unequal numbers of batches.
        has_ended: whether this rank has run out of batches, and takes part in the steps of the other ranks.
        steps: steps of this round.
        steps_along: those of them that were taken along with other ranks, without a batch.
        steps_in_round: length of this round in steps; None if there are no outer steps.
        due: number of steps of this round after which an outer step, or a part of one, is due; None if there are none.
        rate_sums: sums of the learning rates of the round's steps, one per parameter group.
        latest_rates: learning rates of the step that was counted last, or the mean of the steps that were counted last
            together, one per parameter group; empty before the first step.
        loss_sum: sum of the round's losses; may be a framework's scalar, which is not waited for.
        loss_count: number of losses in ``loss_sum``.
        samples: sum of the samples of the round's steps.
        steps_with_samples: number of the round's steps whose samples are known.
        norms: norms of the movements of all ranks in former rounds.
    """

    clock: Callable[[], float]
    period: Period | None = None
    inner_steps: int = 0
    rounds: int = 0
    decisions: list[Decision] = field(default_factory=list)
    has_started: bool = False
    is_in_step: bool = False
    is_joined: bool = False
    has_ended: bool = False
    steps: int = 0
    steps_along: int = 0
    steps_in_round: int | None = None
    due: int | None = None
    rate_sums: list[float] = field(default_factory=list)
    latest_rates: Sequence[float] = ()
    loss_sum: Any = 0.0
    loss_count: int = 0
    samples: float = 0.0
    steps_with_samples: int = 0
    norms: NormHistory = field(default_factory=lambda: NormHistory(1))

    def __post_init__(self) -> None:
        self.start_clock()

    def start_clock(self, seconds: float = 0.0) -> None:
        """Set the time since the first step.

        Args:
            seconds: time that has passed already.
        """
        self._clock_origin = self.clock() - seconds

    def seconds(self) -> float:
        """Return the seconds since the first step; a run that is resumed continues where it was saved."""
        return self.clock() - self._clock_origin

    def begin_round(self, groups: int) -> None:
        """Begin a round, of which no step has been taken.

        Args:
            groups: number of parameter groups.
        """
        self.steps = 0
        self.steps_along = 0
        self.samples = 0.0
        self.steps_with_samples = 0
        self.steps_in_round = self.due = None if self.period is None else self.period.steps()
        self.rate_sums = [0.0] * groups

    def count(self, steps: int, rate_sums: Sequence[float]) -> None:
        """Count steps that were taken.

        Args:
            steps: number of steps.
            rate_sums: sums of their learning rates, one per parameter group.
        """
        if len(rate_sums) != len(self.rate_sums):
            rate_sums = self._for_earlier_groups(steps, rate_sums)
        self.inner_steps += steps
        self.steps += steps
        self.latest_rates = tuple(rate_sums) if steps == 1 else [total / steps for total in rate_sums]
        sums = self.rate_sums
        for group, rate in enumerate(rate_sums):
            sums[group] += rate

    def _for_earlier_groups(self, steps: int, rate_sums: Sequence[float]) -> list[float]:
        """Adapt sums to groups that were added or removed during a round: the buffers follow only at its end.

        A new group counts as if it had had its rate from the start of the round; a removed one keeps its mean.
        """
        known = len(self.rate_sums)
        for total in rate_sums[known:]:
            self.rate_sums.append(total / steps * self.steps)
        gone = [total / max(self.steps, 1) * steps for total in self.rate_sums[len(rate_sums) :]]
        return [*rate_sums, *gone]

    def is_due(self) -> bool:
        """Whether an outer step is due, or a part of one."""
        return self.steps == self.due

    def mean_rates(self) -> list[float]:
        """Return the mean learning rates of the round so far, one per parameter group."""
        return [total / max(self.steps, 1) for total in self.rate_sums]

    def mean_loss(self) -> float:
        """Return the mean loss of the round so far, as a control message carries it."""
        return loss_to_send(float(self.loss_sum) / self.loss_count if self.loss_count else None)

    def forget_losses(self) -> None:
        """Drop the losses of the round, which an outer step has used."""
        self.loss_sum, self.loss_count = 0.0, 0


def mean_loss(losses: Array) -> float:
    """Return the mean of the ranks' losses, NaN if no rank has one.

    Args:
        losses: one per rank, as control messages carry them: NaN for a rank without a loss.
    """
    known = [float(loss) for loss in losses if not isnan(loss)]
    return sum(known) / len(known) if known else nan


def state_of(setup: Setup, progress: Progress) -> dict[str, Any]:
    """Return all that decides the next step of a replica besides parameters and base optimizer."""
    weights_set = {"weights_set": True} if setup.framework.watch.found else {}
    return {
        **weights_set,
        "version": STATE_VERSION,
        "layout": _layout_of(setup),
        "settings": setup.settings.method,
        "rank": setup.transport.rank,
        "size": setup.transport.size,
        **_state_without_base(setup, progress),
        "base": _state_of_base(setup),
    }


def _state_without_base(setup: Setup, progress: Progress) -> dict[str, Any]:
    return {
        "started": progress.has_started,
        "clock": progress.seconds(),
        "decisions": [list(astuple(decision)) for decision in progress.decisions],
        "inner_steps": progress.inner_steps,
        "rounds": progress.rounds,
        "steps": progress.steps,
        "steps_in_round": progress.steps_in_round,
        "rate_sums": list(progress.rate_sums),
        "loss_sum": float(progress.loss_sum),
        "loss_count": progress.loss_count,
        **_state_of_weights(setup, progress),
        "period": None if progress.period is None else progress.period.state_dict(),
        "outer": None if setup.outer is None else setup.outer.state_dict(),
        **_contributions_of(setup),
    }


def _state_of_weights(setup: Setup, progress: Progress) -> dict[str, Any]:
    if not setup.settings.averages_movements:
        return {}
    return {
        "samples": progress.samples,
        "steps_with_samples": progress.steps_with_samples,
        "norms": progress.norms.state_dict(),
    }


def check_state(state: Mapping[str, Any], setup: Setup) -> None:
    """Check that a replica can resume from a state. Changes nothing.

    Args:
        state: result of ``state_of``.
        setup: the replica's transport, framework and method.

    Raises:
        ConfigurationError: if the state is of another version, model, method, world size or rank.
    """
    if state["version"] != STATE_VERSION:
        raise ConfigurationError(
            f"cannot resume: the saved state has version {state['version']} of its format, this Lentando reads version "
            f"{STATE_VERSION}: resume with the Lentando that saved it, or from a checkpoint of lt.save"
        )
    if found := different_from(setup.settings, state["settings"]):
        raise ConfigurationError(f"cannot resume: the state was saved with other settings than those here: {found}")
    expected = {
        "size": (setup.transport.size, "the world size (to change it, use lt.save and lt.load)"),
        "rank": (setup.transport.rank, "the rank (each rank must load the state that it saved itself)"),
        "layout": (_layout_of(setup), "the fingerprint of the model (the same parameters must be trainable)"),
    }
    for key, (wanted, meaning) in expected.items():
        if state[key] != wanted:
            raise ConfigurationError(f"cannot resume: {meaning} is {wanted} here, but {state[key]} in the saved state")


def load_state(state: Mapping[str, Any], setup: Setup, progress: Progress) -> None:
    """Resume from a state that ``state_of`` has returned. Raises as ``check_state``."""
    check_state(state, setup)
    return_to_state(state, setup, progress)
    setup.base.state.load_state_dict(state["base"])


def state_to_return_to(setup: Setup, progress: Progress) -> dict[str, Any]:
    """Return copies of the part of ``state_of`` that does not depend on which ranks are alive. Waits for no message."""
    weights_set = {"weights_set": True} if setup.framework.watch.found else {}
    state: dict[str, Any] = copied({**weights_set, **_state_without_base(setup, progress)})
    return state


def return_to_state(state: Mapping[str, Any], setup: Setup, progress: Progress) -> None:
    """Restore everything but the state of the base algorithm, which is left as it is."""
    # The program may load the model's weights after this, so they are not compared before the next step ends.
    setup.framework.watch.forget()
    setup.framework.watch.reset(found=state.get("weights_set", False))
    progress.has_started = state["started"]
    progress.start_clock(state["clock"])
    progress.decisions = [Decision(*decision) for decision in state["decisions"]]
    progress.inner_steps, progress.rounds = state["inner_steps"], state["rounds"]
    progress.steps, progress.steps_in_round = state["steps"], state["steps_in_round"]
    progress.due = progress.steps_in_round
    progress.rate_sums = list(state["rate_sums"])
    progress.loss_sum, progress.loss_count = state["loss_sum"], state["loss_count"]
    if setup.settings.averages_movements:
        progress.samples, progress.steps_with_samples = state["samples"], state["steps_with_samples"]
        progress.norms.load_state_dict(state["norms"])
    if progress.period is not None:
        progress.period.load_state_dict(state["period"])
    if setup.outer is not None:
        setup.outer.load_state_dict(state["outer"])
    if isinstance(setup.outer, StreamedOuterStep):
        setup.outer.contributed_at = list(state["contributed_at"])
        progress.due = setup.outer.next_due(progress.steps, progress.steps_in_round or 1, progress.inner_steps)


def copied(state: Any) -> Any:
    """Return a state with its arrays copied, within dicts and lists: a saved state must not change with later steps."""
    if isinstance(state, dict):
        return {key: copied(item) for key, item in state.items()}
    if isinstance(state, list):
        return [copied(item) for item in state]
    return state.copy() if hasattr(state, "copy") else state


def _contributions_of(setup: Setup) -> dict[str, Any]:
    """Return the inner steps at which the fragments in flight were contributed, if outer steps are streamed."""
    if not isinstance(setup.outer, StreamedOuterStep):
        return {}
    return {"contributed_at": list(setup.outer.contributed_at)}


def _layout_of(setup: Setup) -> int:
    """Return the fingerprint of the flat buffers: names, shapes, dtypes and groups of the tensors."""
    return fingerprint(describe(buffer.layout for buffer in setup.framework.buffers))


def _state_of_base(setup: Setup) -> dict[str, Any]:
    """Return the state of the base algorithm, which may wait for messages."""
    state: dict[str, Any] = {}
    while not without_vote(setup.transport, lambda: state.update(setup.base.state.state_dict())):
        pass
    return state
