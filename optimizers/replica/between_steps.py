"""What a replica does between two steps: it reports, follows changes, evaluates, restarts, saves, loads, and joins."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeAlias, get_args

from lentando.comm.agreement import Event
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.framework import ChangingFramework, Framework
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.evaluation import Evaluation
from lentando.optimizers.replica.gradients import Gradients
from lentando.optimizers.replica.mixing import Mixing
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rounds import Rounds
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.state import is_of_one_rank, load_state, state_of
from lentando.optimizers.replica.stopping import Stopping
from lentando.optimizers.replica.timing import Timing
from lentando.optimizers.replica.trained_parameters import TrainedParameters
from lentando.optimizers.replica.uneven_data import StepAlong, UnevenData
from lentando.optimizers.replica.weights import Weights
from lentando.optimizers.rules.algorithm_hooks import AlgorithmHooks

__all__ = ["BaseState", "BetweenSteps"]

BaseState: TypeAlias = Literal["keep", "reset"]


class BetweenSteps(ABC):
    """The part of a ``Replica`` that is used between two steps. ``Replica`` sets the attributes, which it describes."""

    framework: Framework
    setup: Setup
    progress: Progress
    timing: Timing
    evaluation: Evaluation
    _channel: Channel
    _trained: TrainedParameters
    _weights: Weights
    _rounds: Rounds
    _uneven: UnevenData

    stopping: Stopping
    gradients: Gradients
    _mixing: Mixing

    @abstractmethod
    def _check_weights(self, has_stepped: bool = False) -> None:
        """Check whether the program has set weights."""

    @abstractmethod
    def _start(self) -> None:
        """Begin the very first step."""

    @abstractmethod
    def _count(self, steps: int, rate_sums: Sequence[float]) -> None:
        """Count steps that were taken, with the sums of their learning rates, one per parameter group."""

    @property
    def inner_steps(self) -> int:
        """Optimizer steps taken; on uneven data, by the rank that took most of them in each round."""
        return self.progress.inner_steps

    @property
    def rounds(self) -> int:
        """Number of outer steps taken."""
        return self.progress.rounds

    @property
    def period(self) -> int | None:
        """Inner steps of the current round, None if there are no outer steps."""
        return self.progress.steps_in_round

    @property
    def joined(self) -> bool:
        """Whether the ranks may have unequal numbers of batches; see ``join``."""
        return self.progress.is_joined

    @property
    def base(self) -> AlgorithmHooks:
        """The hooks of the base algorithm; replaced after ranks have died, or when other parameters are trained."""
        return self.setup.base

    def follow_changes(self) -> None:
        """Train what the model and the optimizer now ask to be trained. Collective if that has changed.

        Called before gradients are averaged. Otherwise it happens at the next outer step, or whenever else all ranks
        communicate between steps.

        Raises:
            MismatchError: on every rank, if the changes differ between ranks.
            ConfigurationError: if nothing is left to be trained, inside ``averaged()``, or in an elastic job.
        """
        if self.evaluation.is_open and self._trained.pending() is not None:
            raise ConfigurationError(
                "parameters cannot be frozen, unfrozen, added or removed inside averaged(): do so after the block"
            )
        self._trained.follow()

    def averaged(self) -> AbstractContextManager[None]:
        """Hold the exact average of all replicas inside the block, and restore each replica's own parameters after it.

        Collective: every rank enters. Inside, the optimizer neither steps nor saves or loads.

        Raises:
            NonFiniteError: on every rank, if parameters are not finite on one of them (with ``on_nonfinite="skip"``,
                if they are finite on none).
        """
        self.evaluation.refuse("averaged()")
        self._check_weights()
        self._notice_resized_buffers()
        self.follow_changes()
        self._trained.warn_of_left_out()
        return self.evaluation.averaged()

    def consensus_distance(self) -> float:
        """Return the root mean square over ranks of the distance between a replica's parameters and the mean.

        Collective: every rank calls it.
        """
        self.evaluation.refuse("consensus_distance()")
        self.follow_changes()
        return self.evaluation.consensus_distance()

    def restart(self, base_state: BaseState = "keep") -> None:
        """Begin a new round from the present weights: their average over the ranks becomes weights and anchor.

        Collective: every rank calls it, between steps. Weights that are equal on all ranks stay exactly as they are.
        The outer momentum begins at zero, gossip at weight 1 with nothing in flight. The next outer step follows a
        whole period later; the counts of steps and rounds, and the period's schedule, continue.

        Args:
            base_state: "keep" to keep the state of the base optimizer, "reset" to reset it to that of a new one.

        Raises:
            ConfigurationError: for another ``base_state``, in the middle of a step, inside ``join`` or ``averaged()``.
            NonFiniteError: as ``averaged``.
            MismatchError: on every rank, if the ranks are not about to do the same.
        """
        progress = self.progress
        if base_state not in get_args(BaseState):
            legal = " or ".join(map(repr, get_args(BaseState)))
            raise ConfigurationError(f"base_state must be {legal}, got {base_state!r}")
        self._check_between_steps("restart()")
        self._check_weights()
        self.follow_changes()
        self.timing.pause()
        self._weights.restart()
        if progress.has_unequal_rounds:
            self._uneven.settle_round(progress.mean_rates())
        if base_state == "reset":
            self.framework.reset_optimizer()
        progress.forget_losses()
        self._rounds.begin()
        self.timing.resume()

    def adopt_average(self) -> None:
        """Continue from what ``averaged()`` shows, outer steps in flight included; if that differs, begin a new round.

        Collective: every rank calls it, between steps. Raises as ``restart``.
        """
        self._check_between_steps("adopt_average()")
        with self.averaged():
            averages = [buffer.array.copy() for buffer in self.framework.buffers]
        if self._weights.replace(averages):
            self.restart()

    def _check_between_steps(self, action: str) -> None:
        self.evaluation.refuse(action)
        if self.progress.is_in_step or self.progress.is_joined:
            where = "in the middle of a step" if self.progress.is_in_step else "inside join"
            raise ConfigurationError(f"{action} is not possible {where}: call it between steps, outside join")

    @contextmanager
    def join(self, step_along: StepAlong) -> Iterator[None]:
        """Let ranks have unequal numbers of batches inside the block; see ``lentando.optimizers.join``.

        Args:
            step_along: takes a step with averaged gradients; called only if the base algorithm averages gradients.
        """
        progress, timing, uneven = self.progress, self.timing, self._uneven
        self.evaluation.refuse("join")
        with uneven.block():
            yield
            progress.has_ended = True
            timing.pause()
            if not progress.has_started:
                progress.start_clock()
                self._start()
            self._check_weights()
            uneven.take_part(self.gradients, self._mixing, self._rounds, self.stopping, step_along, self._count)
            timing.resume()
            self.framework.watch.mark()
        self.stopping.stop_if_agreed(automatic=False)

    @contextmanager
    def weights_changed_by(self, action: str) -> Iterator[None]:
        """Let the block change the weights of this rank between steps, and continue from them.

        Args:
            action: what changes them, for the error message.

        Raises:
            ConfigurationError: inside ``averaged()``, whose end restores the previous weights.
        """
        if self.evaluation.is_open:
            raise ConfigurationError(
                f"{action} is not possible inside averaged(): it changes the weights, and the end of the block "
                "restores the previous ones. Call it before the block, and the average is one of the changed weights"
            )
        self._check_weights()
        yield
        self.setup.continue_from_weights()

    def meet(self, event: Event) -> None:
        """Agree with all ranks that a checkpoint is about to be saved, or loaded, at the same step. Collective.

        Args:
            event: ``Event.SAVE`` or ``Event.LOAD``.

        Raises:
            MismatchError: on every rank, if the ranks are about to do different things.
            ConfigurationError: in the middle of a step.
        """
        action = "saves" if event is Event.SAVE else "loads"
        self.evaluation.refuse(f"to {event.name.lower()} a checkpoint")
        if self.progress.is_in_step:
            raise ConfigurationError(f"this rank {action} a checkpoint in the middle of a step: do so between steps")
        self._notice_resized_buffers()
        self.follow_changes()
        self._channel.agree(event, f"{action} a checkpoint of")

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides the next step besides parameters and base optimizer, as plain values and arrays.

        Every rank has its own: anchors and slow momenta are sharded.
        """
        self._check_weights()
        if (change := self._trained.pending()) is not None:
            raise ConfigurationError(
                f"this state could not be loaded again: the model is about to change, with {change}, which the ranks "
                "do together when they next communicate. Save after the next outer step, or use lt.save"
            )
        return state_of(self.setup, self.progress)

    @property
    def state_is_of_one_rank(self) -> bool:
        """Whether ``state_dict()`` differs between ranks. It does not if each step averages gradients, and no more."""
        return is_of_one_rank(self.setup)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken. Parameters and base optimizer are restored by the framework.

        Raises:
            ConfigurationError: if the state is of another version, model or method, of another world size or rank
                where ``state_is_of_one_rank``, and inside ``averaged()``.
        """
        self.evaluation.refuse("to load a state dict")
        load_state(state, self.setup, self.progress)
        self._channel.forget_start()

    def recover(self) -> None:
        """Plan again with the remaining ranks after some have died. Collective over the remaining ranks."""
        self.setup.recover()
        self.timing.forget_ranks()

    def position(self) -> str:
        """Return how far this replica is, for messages."""
        return f"after inner step {self.progress.inner_steps} and {self.progress.rounds} rounds"

    def _notice_resized_buffers(self) -> None:
        """Notice buffers that were resized since the ranks last communicated, for ``follow_changes`` to handle."""
        if isinstance(self.framework, ChangingFramework):
            self.framework.load()
