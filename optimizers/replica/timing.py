"""Where a replica's time goes: computing, waiting for slower ranks, communicating; and what the delay model says of it.

Measured by each rank's own clock between communications, so that nothing is asked, and nothing sent, in between. What
ranks tell each other rides in the control messages: mean and deviation of their compute times, so that all know who is
slow, and how long the last control message took. It is a barrier: the rank that came last did not wait, so the shortest
of these times is the message's own, and what others took longer, they waited. Durations are compared, never clocks.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan, nan, sqrt
from typing import Any, Literal, TypeAlias

from lentando.comm.control import Agreement
from lentando.comm.transport import Transport
from lentando.optimizers.planning import (
    Delays,
    all_reduce_seconds,
    as_compute,
    expected_maximum_seconds,
    local_sgd_seconds,
    stragglers,
)
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm

__all__ = ["Kind", "Timing"]

Kind: TypeAlias = Literal["gradients", "gossip", "outer"]
"""What a communication is for."""

MEMORY_SAMPLES = 1024
"""Samples after which older ones begin to count less: a job's speed changes."""
PAUSE_FROM = 10.0
"""A sample that lasts so many times the median of the last ones is no training."""
RECENT = 15


@dataclass
class _Mean:
    """Of durations. The first is forgotten when there is a second: it has set up memory and connections."""

    count: int = 0
    seconds: float = nan

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count <= 2:
            self.seconds = seconds
        else:
            self.seconds += (seconds - self.seconds) / min(self.count - 1, MEMORY_SAMPLES)


@dataclass
class _ComputeTime:
    """Mean and variance of a step's compute time, from samples of several steps each (West 1979).

    The same as ``estimate_compute`` computes from a list: with x_r the mean over the n_r steps of a sample, the
    variance of a step is sum n_r (x_r - Y)^2 / (R - 1).
    """

    samples: float = 0.0
    steps: float = 0.0
    mean_seconds: float = nan
    squares: float = 0.0

    def add(self, seconds: float, steps: int) -> None:
        mean = seconds / steps
        if self.samples >= MEMORY_SAMPLES:
            self.samples, self.steps, self.squares = self.samples / 2, self.steps / 2, self.squares / 2
        self.samples += 1
        self.steps += steps
        if self.samples == 1:
            self.mean_seconds = mean
            return
        away = mean - self.mean_seconds
        self.mean_seconds += away * steps / self.steps
        self.squares += steps * away * (mean - self.mean_seconds)

    @property
    def deviation_seconds(self) -> float:
        return sqrt(max(self.squares, 0.0) / (self.samples - 1)) if self.samples > 1 else nan


@dataclass
class _Now:
    """A communication under way."""

    kind: Kind
    began: float
    agreed_seconds: float = 0.0
    is_usual: bool = True


@dataclass
class Timing:
    """The times of one replica.

    Args:
        transport: whose clock is used; virtual in a simulation.

    Attributes:
        communication_seconds: in all communication, waiting included.
        waiting_seconds: of that, for slower ranks, as far as control messages show it.
    """

    transport: Transport
    communication_seconds: float = 0.0
    waiting_seconds: float = 0.0
    _compute: _ComputeTime = field(default_factory=_ComputeTime)
    _delays: dict[Kind, _Mean] = field(
        default_factory=lambda: {kind: _Mean() for kind in ("gradients", "gossip", "outer")}
    )
    _control: _Mean = field(default_factory=_Mean)
    _compute_by_rank: list[float] = field(default_factory=list)
    _deviation_by_rank: list[float] = field(default_factory=list)
    _agreed_seconds: float = nan
    _now: _Now | None = None
    _started_at: float | None = None
    _first_step: int = 0
    _ended_at: float = 0.0
    _last_step: int = 0
    _uncounted_seconds: float = 0.0
    _paused_at: float | None = None
    _was_unusual: bool = False
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def is_started(self) -> bool:
        """Whether the first step, which sets up what later ones use, is over."""
        return self._started_at is not None

    def start(self, step: int) -> None:
        """Count from here: ``step`` inner steps are over."""
        self._started_at = self._ended_at = self.transport.clock()
        self._first_step = self._last_step = step

    def begin(self, kind: Kind, step: int) -> None:
        """A communication begins. What went before was computing.

        Args:
            kind: what it is for.
            step: inner steps that have computed, the current one included if its gradients are there.
        """
        now = self.transport.clock()
        self._now = _Now(kind, now)
        if self._started_at is None:
            return
        seconds = now - self._ended_at + self._uncounted_seconds
        steps = step - self._last_step
        if steps > 0:
            if self._is_pause(seconds / steps):
                self._started_at += seconds
                self._first_step += steps
            else:
                self._compute.add(seconds, steps)
            self._last_step, self._uncounted_seconds = step, 0.0
        else:
            self._uncounted_seconds = seconds  # a step that communicates twice: part of the next sample

    def _is_pause(self, seconds: float) -> bool:
        """Whether these were no usual steps: a checkpoint was written, or something else was done in between.

        One sample alone, ten times as long as usual. The second of two in a row is a new speed.
        """
        recent, was_unusual = self._recent, self._was_unusual
        self._was_unusual = len(recent) > 1 and seconds > PAUSE_FROM * sorted(recent)[len(recent) // 2]
        if self._was_unusual and not was_unusual:
            return True
        recent.append(seconds)
        return False

    def end(self) -> None:
        """It is over."""
        now = self._now
        assert now is not None
        self._ended_at = self.transport.clock()
        self._now = None
        seconds = self._ended_at - now.began
        self.communication_seconds += seconds
        if self._started_at is not None and now.is_usual:
            self._delays[now.kind].add(seconds - now.agreed_seconds)

    def shares(self) -> dict[str, float]:
        """What this rank tells the others in its next control message."""
        return {
            "compute_seconds": self._compute.mean_seconds,
            "compute_deviation_seconds": self._compute.deviation_seconds,
            "agreed_seconds": self._agreed_seconds,
        }

    def heard(self, agreement: Agreement, seconds: float) -> None:
        """A control message of a communication has come back after ``seconds``."""
        if self._now is None:
            return
        self._now.agreed_seconds += seconds
        self._compute_by_rank = agreement.compute_seconds
        self._deviation_by_rank = agreement.compute_deviation_seconds
        # Those times belong to the message before this one.
        shortest = min(agreement.agreed_seconds)
        if not isnan(shortest):
            self._control.add(shortest)
            self.waiting_seconds += self._agreed_seconds - shortest
        self._agreed_seconds = seconds

    def forget_ranks(self) -> None:
        """They are others now; the communication under way, if any, has lasted as none does."""
        self._compute_by_rank, self._deviation_by_rank = [], []
        self._agreed_seconds = nan
        if self._now is not None:
            self._now.is_usual = False

    def pause(self) -> None:
        """What follows is no training."""
        self._paused_at = self.transport.clock()

    def resume(self) -> None:
        """Training goes on."""
        if self._paused_at is not None and self._started_at is not None:
            paused = self.transport.clock() - self._paused_at
            self._started_at += paused
            self._ended_at += paused
        self._paused_at = None

    def skip(self, steps: int) -> None:
        """So many steps were counted that this rank has not taken."""
        self._first_step += steps
        self._last_step += steps

    def report(self, base: BaseAlgorithm, period: int | None) -> dict[str, Any]:
        """Plain numbers, measured from the second step on, evaluation left out; None for what is not known, or not yet.

        ``compute_seconds``: mean compute time of a step on this rank (Y), with ``compute_deviation_seconds``.
        ``compute_seconds_by_rank``, ``compute_deviation_seconds_by_rank``: of all ranks, as they told in the last
        control message.
        ``stragglers``: ranks that are slower for good.
        ``delay_seconds``: of an outer step, or without those, of an average of gradients, once all have come to it (D).
        ``latency_seconds``: of a control message. ``delay_ratio``: D / Y.
        ``exchange_seconds``: of a gossip step, waiting included.
        ``waiting_seconds``: for slower ranks in all, as far as control messages show it.
        ``seconds_per_step``: in all. ``predicted_seconds_per_step``: the same by the delay model; None for gossip,
        whose delay cannot be told from waiting.
        ``seconds_saved``: so far against synchronous SGD, by the delay model; see ``_synchronous_seconds``.
        """
        delay = self._delay_seconds("outer" if period is not None else "gradients")
        by_rank = list(self._compute_by_rank) or None
        if by_rank is not None and any(map(isnan, by_rank)):
            by_rank = None
        steps = self._last_step - self._first_step
        measured = (self._ended_at - (self._started_at or 0.0)) / steps if steps else None
        predicted = saved = slow = None
        if by_rank is not None:
            slow = stragglers(by_rank, self._deviation_by_rank, round(self._compute.steps))
            predicted = self._predicted_seconds(by_rank, base, period)
            synchronous = self._synchronous_seconds(by_rank)
            if synchronous is not None and measured is not None:
                saved = 0.0 if base.averages_gradients else (synchronous - measured) * steps
        gossip = self._delays["gossip"]
        return {
            "compute_seconds": _known(self._compute.mean_seconds),
            "compute_deviation_seconds": _known(self._compute.deviation_seconds),
            "compute_seconds_by_rank": by_rank,
            "compute_deviation_seconds_by_rank": [_known(seconds) for seconds in self._deviation_by_rank]
            if by_rank
            else None,
            "stragglers": slow,
            "delay_seconds": delay,
            "latency_seconds": _known(self._control.seconds),
            "delay_ratio": delay / self._compute.mean_seconds if delay and self._compute.mean_seconds > 0 else None,
            "exchange_seconds": _known(gossip.seconds),
            "waiting_seconds": self.waiting_seconds,
            "seconds_per_step": measured,
            "predicted_seconds_per_step": predicted,
            "seconds_saved": saved,
        }

    def _delay_seconds(self, kind: Kind) -> float | None:
        """D: once all ranks had come."""
        delay = self._delays[kind].seconds + (
            0.0 if self._control.seconds != self._control.seconds else self._control.seconds
        )
        return _known(delay)

    def _predicted_seconds(self, by_rank: Sequence[float], base: BaseAlgorithm, period: int | None) -> float | None:
        """The delay model's time per step of this setting. Of gossip no delay is known that holds no waiting."""
        gradients, outer = self._delay_seconds("gradients"), self._delay_seconds("outer")
        if base.mixes_parameters or (base.averages_gradients and gradients is None) or (period and outer is None):
            return None
        compute, size = as_compute(by_rank, self._deviation_by_rank), len(by_rank)
        delays = Delays(gradients or 0.0, outer or 0.0)
        if not base.averages_gradients:
            return local_sgd_seconds(compute, size, delays, period) if period else None
        return all_reduce_seconds(compute, size, delays) + (delays.outer_step / period if period else 0.0)

    def _synchronous_seconds(self, by_rank: Sequence[float]) -> float | None:
        """What a step of synchronous SGD would take. An estimate where no gradients are averaged.

        Their average is then taken to cost what an outer step does without its second question, whether the average is
        finite. For small models that is too much: by the engine's all-reduce, two halves cost more than the whole.
        """
        delay = self._delay_seconds("gradients")
        if delay is None:
            delay = _known(self._delays["outer"].seconds)
        if delay is None:
            return None
        return expected_maximum_seconds(as_compute(by_rank, self._deviation_by_rank), len(by_rank)) + delay


def _known(seconds: float) -> float | None:
    return None if isnan(seconds) else seconds
