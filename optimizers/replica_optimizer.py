"""The public methods that a distributed optimizer has in every framework, written and documented once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from os import PathLike
from typing import Any

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.flat_report import flat_report
from lentando.optimizers.replica import BaseState, Replica
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.period import Period
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.run_log import Logger, RunLog
from lentando.optimizers.summary import summary_of

__all__ = ["ReplicaOptimizer", "check_not_wrapped"]


class ReplicaOptimizer:
    """Base class of every ``DistributedOptimizer``, whatever its framework.

    A framework's ``DistributedOptimizer`` inherits this class and the framework's own optimizer class. It sets
    ``_settings``, implements ``_ready_replica``, ``_step_along`` and ``_describe_base``, and overrides the other hooks
    (the methods that begin with an underscore) where the framework needs them.

    Raises:
        NotInitializedError: before ``init()``.
        ConfigurationError: for settings that cannot work.
        MismatchError: on every rank, if models or settings differ between ranks.
    """

    _settings: Settings

    @property
    def period(self) -> int | None:
        """Inner steps of the current round on this rank; None if there are no outer steps."""
        return self._ready_replica().period

    @property
    def rounds(self) -> int:
        """Number of outer steps taken, the same on all ranks."""
        return self._ready_replica().rounds

    @property
    def schedule(self) -> Period | None:
        """This optimizer's own copy of the period that it was given, which decides the lengths of rounds.

        A number of inner steps is a ``FixedPeriod``; None if there are no outer steps. A schedule that needs to know
        more than the optimizer passes to it has methods to report that, such as
        ``AdaptivePeriod.record_validation_loss``.
        """
        return self._ready_replica().progress.period

    def averaged(self) -> AbstractContextManager[None]:
        """Return a block inside which the model is the exact average of all replicas, for evaluation.

        Collective: every rank enters the block. At its end each replica has its own weights again. The average can only
        be read: optimizer steps, ``lt.save`` and ``lt.load`` inside the block are an error, and what is written into
        the weights is lost at its end. A PyTorch ``state_dict()`` or a ``tf.Variable`` that is kept beyond the block
        shows this rank's own weights again. To keep the average, write it to a file inside the block, or copy it with
        ``copy.deepcopy(model.state_dict())`` or Keras's ``model.get_weights()``.

        Raises:
            NonFiniteError: on every rank, if the parameters of one of them are not finite. With
                ``on_nonfinite="skip"``, if those of all ranks are not finite.
            MismatchError: on every rank, if the ranks are not about to do the same thing.
        """
        return self._reading(self._ready_replica().averaged())

    @contextmanager
    def _reading(self, block: AbstractContextManager[None]) -> Iterator[None]:
        with block:
            self._weights_exchanged()
            yield

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let ranks take unequal numbers of steps inside the block; ``lt.join(optimizer)`` returns this block."""
        with self._before_join(), self._ready_replica().join(self._step_along):
            yield
            self._report_steps()
        self._refresh()

    def restart(self, *, base_state: BaseState = "keep") -> None:
        """Begin a new round with the average of the present weights as the weights of all ranks.

        Collective: every rank calls it between two steps, for example after it has loaded earlier weights. Weights that
        are equal on all ranks keep their values exactly. The outer momentum becomes zero, and the next outer step
        follows a whole period later. The numbers of steps and rounds, and the schedule of the period, continue.

        Args:
            base_state: what happens to the state of the base optimizer: "keep" leaves it, "reset" makes it that of a
                new optimizer. In Keras, "reset" needs an optimizer that was wrapped with ``base_buffers="reset"`` or
                ``on_nonfinite="skip"``.

        Raises:
            ConfigurationError: in the middle of a step, inside ``join`` or ``averaged()``, or if the base optimizer
                cannot be reset.
            NonFiniteError: on every rank, if the parameters of one of them are not finite.
            MismatchError: on every rank, if the ranks are not about to do the same thing.
        """
        if base_state == "reset":
            self._check_resettable()
        self._ready_replica().restart(base_state)
        self._refresh()

    def adopt_average(self) -> None:
        """Make the exact average of all replicas the weights of every rank, to end training with the model it is for.

        Collective: every rank calls it between two steps, after the last one. It keeps what ``averaged()`` shows: outer
        steps in flight (``delay``, ``fragments``) are adopted. If this changes the weights of any rank, a new round
        begins from them, as with ``restart()``. Otherwise nothing changes, and training may continue.

        Raises:
            ConfigurationError: in the middle of a step, inside ``join`` or ``averaged()``.
            NonFiniteError: as ``averaged()``.
            MismatchError: on every rank, if the ranks are not about to do the same thing.

        Example:
            >>> import torch, lentando.torch as lt
            >>> lt.init()
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2, delay=1)
            >>> for _ in range(2):
            ...     model(torch.ones(1, 2)).sum().backward()
            ...     optimizer.step()
            >>> optimizer.adopt_average()
            >>> weights = model.weight.detach().clone()
            >>> with optimizer.averaged():
            ...     torch.equal(model.weight, weights)
            True
            >>> lt.shutdown()
        """
        self._ready_replica().adopt_average()
        self._refresh()

    def consensus_distance(self) -> float:
        """Return the distance of the replicas from their mean, as the root mean square over ranks.

        Collective: every rank calls it.
        """
        return self._ready_replica().consensus_distance()

    def report(self, *, flat: bool = False) -> dict[str, Any]:
        """Return metrics of this rank so far, as plain numbers.

        ``period`` (inner steps of the current round, or None), ``delay``, ``fragments``, ``rounds``, ``inner_steps``,
        ``size`` (ranks), ``model_bytes``. Of gradients, gossip and outer steps, without evaluation: ``bytes_sent``,
        ``messages`` (point-to-point and collective) and ``communication_seconds`` (including the time spent waiting for
        other ranks). ``left_out``: how often this rank's values were left out of an average because they were not
        finite. ``decisions`` of a period that adapts: dicts with the fields of ``lt.Decision``, oldest first. Compute
        time, delays, stragglers and the estimated time saved: ``lentando.optimizers.report.report_of`` lists them. The
        estimates take milliseconds, too long for a call at every step.

        Args:
            flat: whether to return one number for each name, as TensorBoard and other loggers take them. Unknown values
                and the list of decisions are left out, and lists by rank become ``NAME/RANK``.
        """
        report = report_of(self._ready_replica())
        return flat_report(report) if flat else report

    def summary(self) -> str:
        """Return a table of all ranks, as text: steps, megabytes sent, and where the time has gone. Collective.

        A row contains, of one rank: its number and host, inner steps, rounds, megabytes sent, the duration of a step
        and the part of it spent computing in milliseconds, and the time in seconds that it has waited for others and
        communicated so far. Times are missing before the second step. The table is the same on all ranks.

        Raises:
            MismatchError: on every rank, if one of them does something else.

        Example:
            >>> import torch, lentando.torch as lt
            >>> lt.init()
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
            >>> header, _, row = optimizer.summary().splitlines()
            >>> header.split()[:4]
            ['rank', 'host', 'steps', 'rounds']
            >>> lt.shutdown()
        """
        replica = self._ready_replica()
        return summary_of(replica.transport, report_of(replica))

    def open_log(self, folder: "str | PathLike[str]", *, to: Logger | None = None) -> RunLog:
        """Open a log of this run, to which ``write(loss=...)`` adds lines; ``lentando report`` draws it. Collective.

        Args:
            folder: folder of the run, which is created. Rank 0 writes ``run.jsonl`` there, or continues it.
            to: where rank 0 writes each line, too: a ``SummaryWriter`` of TensorBoard, or a function that takes a dict
                of numbers and the inner step, such as ``run.log`` of W&B or ``mlflow.log_metrics``. The names of the
                optimizer's own numbers begin with "lentando/" there. Other ranks may leave it out.

        Raises:
            ConfigurationError: on every rank, if rank 0 cannot write there, or ``to`` is neither.
            MismatchError: on every rank, if one of them does something else.

        Example:
            >>> import tempfile, torch, lentando.torch as lt
            >>> lt.init()
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
            >>> log = optimizer.open_log(tempfile.mkdtemp())
            >>> line = log.write(loss=0.5)
            >>> line["step"], line["loss"], line["period"]
            (0, 0.5, 12)
            >>> lt.shutdown()
        """
        replica = self._ready_replica()
        seconds = replica.progress.seconds
        topology = getattr(self._settings.base, "topology", None)
        distance = self.consensus_distance
        return RunLog(replica.transport, folder, repr(self), self.report, seconds, distance, topology, to)

    @property
    def state_is_of_one_rank(self) -> bool:
        """Whether the replica's state differs between ranks, beyond the weights and the base optimizer's state."""
        return self._ready_replica().state_is_of_one_rank

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the replica's state for ``roll_back``. Elastic states save it with the base optimizer's."""
        return self._ready_replica().rollback.snapshot()

    def roll_back(self, snapshot: Mapping[str, Any]) -> None:
        """Return to a ``snapshot()`` of this rank; the caller restores the weights and the base optimizer's state."""
        self._ready_replica().rollback.roll_back(snapshot)

    def adopt_rank_0(self) -> None:
        """Continue from weights and base optimizer state that have been broadcast from rank 0. Collective."""
        self._ready_replica().rollback.adopt_rank_0()
        self._refresh()

    def __repr__(self) -> str:
        """The method, its base algorithm, the settings that are not the defaults, and the base optimizer."""
        shown = [
            f"{field.name}={value!r}"
            for field in fields(self._settings)
            if (value := getattr(self._settings, field.name)) != field.default or field.name == "base"
        ]
        return f"{type(self).__name__}({', '.join([*shown, f'optimizer={self._describe_base()}'])})"

    def _ready_replica(self) -> Replica:
        """The replica, once all steps so far have been reported to it."""
        raise NotImplementedError

    def _step_along(self, rates: Sequence[float], overflow: bool) -> bool:
        """Step along the averaged gradients, on a rank that has run out of batches inside ``join``.

        Args:
            rates: learning rates of the ranks that still take steps, by parameter group.
            overflow: whether the gradients of one of those ranks have overflowed.

        Returns:
            Whether this completes an inner step.
        """
        raise NotImplementedError

    def _describe_base(self) -> str:
        """Text for ``repr``: the base optimizer and its hyperparameters."""
        raise NotImplementedError

    def _before_join(self) -> AbstractContextManager[object]:
        """Check that ``join`` is possible now, and return a block that lasts as long as it."""
        return nullcontext()

    def _report_steps(self) -> None:
        """Report to the replica the steps that were counted elsewhere."""

    def _weights_exchanged(self) -> None:
        """Called when the replica has exchanged the weights for the average of all replicas."""

    def _refresh(self) -> None:
        """Called when the replica has changed how many steps may follow before it must be called again."""

    def _check_resettable(self) -> None:
        """Raise ``ConfigurationError`` if the base optimizer cannot be made new."""


def check_not_wrapped(*optimizers: object) -> None:
    """Check that no optimizer is wrapped twice.

    Args:
        *optimizers: the base optimizer that is to be wrapped, and those that it holds.

    Raises:
        ConfigurationError: if one of them is a ``DistributedOptimizer`` of any framework.
    """
    if any(isinstance(optimizer, ReplicaOptimizer) for optimizer in optimizers):
        raise ConfigurationError("this optimizer is a DistributedOptimizer already: wrap the base optimizer, once")
