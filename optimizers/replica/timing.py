"""Where a replica's time and traffic go: computing, waiting for slower ranks, communicating.

Times are measured by each rank's own clock between communications, so nothing is sent for them in between. Ranks share
them in the control messages: mean and deviation of their compute times, so that all know which ranks are slow, and how
long the last control message took. A control message is a barrier: the rank that came last did not wait, so the
shortest of these times is the message's own, and the rest of the longer ones is waiting. Durations are compared, never
clocks.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan, nan, sqrt
from typing import Literal, TypeAlias

from lentando.comm import timeline
from lentando.comm.agreement import Event
from lentando.comm.stall import watched
from lentando.comm.transport import Array, Transport
from lentando.optimizers.replica.progress import Progress

__all__ = ["Costs", "Kind", "Timing"]

Kind: TypeAlias = Literal["gradients", "gossip", "outer"]
"""Purpose of a communication."""

MEMORY_SAMPLES = 1024
"""Number of samples after which older ones begin to count less, because the speed of a job changes."""
PAUSE_FROM = 10.0
"""A sample that lasts this many times the median of the last ones is a pause, not training."""
RECENT = 15
"""Number of samples whose median is compared with the next one."""

_WAITS: dict[Kind, str] = {
    "gradients": "the average of gradients of inner step",
    "gossip": "the gossip of inner step",
    "outer": "the outer step after inner step",
}
_RECORDED: dict[Kind, str] = {"gradients": "AVERAGE_GRADIENTS", "gossip": "GOSSIP", "outer": "OUTER_STEP"}
"""Names of these events in a timeline."""


@dataclass
class _Mean:
    """Mean of durations. The first one, which sets up memory and connections, is dropped when there is a second."""

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

    The result equals that of ``estimate_compute`` for a list: with x_r the mean over the n_r steps of a sample, the
    variance of a step is sum n_r (x_r - Y)^2 / (R - 1).
    """

    samples: float = 0.0
    steps: float = 0.0
    mean_seconds: float = nan
    squares: float = 0.0
    latest_seconds: float = nan

    def add(self, seconds: float, steps: int) -> None:
        mean = self.latest_seconds = seconds / steps
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
class _Communication:
    """A communication in progress."""

    kind: Kind
    began: float
    agreed_seconds: float = 0.0
    is_usual: bool = True


class Timing:
    """Measures the times of one replica, and shares them in its control messages.

    Args:
        transport: transport whose clock is used; virtual in a simulation.
        shares_latest: whether messages also carry the compute time of the latest steps, for a period that follows it.

    Attributes:
        is_started: whether the first step, which sets up what later ones use, is over.
        communication_seconds: time of all communication so far, waiting included.
        waiting_seconds: the part of it spent waiting for slower ranks, as far as control messages show it.
        compute: compute times of this rank's steps.
        delays: durations of communications, by purpose, once all ranks have reached them; without control messages.
        message: durations of a control message once all ranks have reached it.
        compute_by_rank: mean compute times in seconds, by rank, as of the last message.
        deviation_by_rank: standard deviations of them in seconds.
    """

    def __init__(self, transport: Transport, shares_latest: bool = False) -> None:
        self.is_started = False
        self.communication_seconds = 0.0
        self.waiting_seconds = 0.0
        self.compute = _ComputeTime()
        self.message = _Mean()
        self.compute_by_rank: list[float] = []
        self.deviation_by_rank: list[float] = []
        self._clock = transport.clock
        self._shares_latest = shares_latest
        self.delays: dict[Kind, _Mean] = {kind: _Mean() for kind in _WAITS}
        self._agreed_seconds = nan
        self._message_began = nan
        self._current: _Communication | None = None
        self._started_at = 0.0
        self._first_step = 0
        self._ended_at = 0.0
        self._last_step = 0
        self._uncounted_seconds = 0.0
        self._paused_at: float | None = None
        self._was_unusual = False
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def steps(self) -> int:
        """Number of steps measured so far."""
        return self._last_step - self._first_step

    @property
    def step_seconds(self) -> float:
        """Time in seconds that the measured steps took."""
        return self._ended_at - self._started_at

    def start(self, step: int) -> None:
        """Begin to measure.

        Args:
            step: number of inner steps that are over.
        """
        self.is_started = True
        self._started_at = self._ended_at = self._clock()
        self._first_step = self._last_step = step

    def begin(self, kind: Kind, step: int) -> None:
        """Begin a communication. The time since the last one was spent computing.

        Args:
            kind: purpose of the communication.
            step: number of inner steps that have computed, including the current one if its gradients are computed.
        """
        now = self._clock()
        self._current = _Communication(kind, now)
        if not self.is_started:
            return
        seconds = now - self._ended_at + self._uncounted_seconds
        steps = step - self._last_step
        if steps > 0:
            if self._is_pause(seconds / steps):
                self._started_at += seconds
                self._first_step += steps
            else:
                self.compute.add(seconds, steps)
            self._last_step, self._uncounted_seconds = step, 0.0
        else:
            self._uncounted_seconds = seconds  # a step that communicates twice: part of the next sample

    def _is_pause(self, seconds: float) -> bool:
        """Whether a sample is a pause: a checkpoint was written, or the program did something else in between.

        A pause is a single sample that is ten times as long as usual. The second of two in a row is a new speed.
        """
        recent, was_unusual = self._recent, self._was_unusual
        self._was_unusual = len(recent) > 1 and seconds > PAUSE_FROM * sorted(recent)[len(recent) // 2]
        if self._was_unusual and not was_unusual:
            return True
        recent.append(seconds)
        return False

    def end(self) -> None:
        """End the communication in progress."""
        current = self._current
        assert current is not None
        self._ended_at = self._clock()
        self._current = None
        seconds = self._ended_at - current.began
        self.communication_seconds += seconds
        if self.is_started and current.is_usual:
            self.delays[current.kind].add(seconds - current.agreed_seconds)

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach this rank's compute times of a step, and the duration of its last message, in seconds."""
        self._message_began = self._clock()
        latest = {"latest_compute_seconds": self.compute.latest_seconds} if self._shares_latest else {}
        return {
            "compute_seconds": self.compute.mean_seconds,
            "compute_deviation_seconds": self.compute.deviation_seconds,
            "agreed_seconds": self._agreed_seconds,
            **latest,
        }

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Measure how long the message took, and how long this rank waited in the one before."""
        if self._current is None:
            return
        seconds = self._clock() - self._message_began
        self._current.agreed_seconds += seconds
        self.compute_by_rank = by_rank["compute_seconds"].tolist()
        self.deviation_by_rank = by_rank["compute_deviation_seconds"].tolist()
        shortest = min(by_rank["agreed_seconds"].tolist())  # of the message before this one
        if not isnan(shortest):
            self.message.add(shortest)
            self.waiting_seconds += self._agreed_seconds - shortest
        self._agreed_seconds = seconds

    def forget_ranks(self) -> None:
        """Drop the other ranks' times after some ranks have died, and leave the communication in progress out."""
        self.compute_by_rank, self.deviation_by_rank = [], []
        self._agreed_seconds = nan
        if self._current is not None:
            self._current.is_usual = False

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        self._paused_at = self._clock()

    def resume(self) -> None:
        """Let the clock run again: training continues."""
        if self._paused_at is not None and self.is_started:
            paused = self._clock() - self._paused_at
            self._started_at += paused
            self._ended_at += paused
        self._paused_at = None

    def skip(self, steps: int) -> None:
        """Leave out steps that were counted and not taken by this rank."""
        self._first_step += steps
        self._last_step += steps


class Costs:
    """Counts bytes, messages and time of a replica's communication. Evaluation is not counted.

    Args:
        transport: transport whose traffic is counted.
        progress: progress of the replica: the time of a rank that has run out of batches is not counted.
        timing: measures the time.

    Attributes:
        bytes_sent: bytes sent so far.
        messages: messages so far, point-to-point and collective.
    """

    def __init__(self, transport: Transport, progress: Progress, timing: Timing) -> None:
        self.bytes_sent = 0
        self.messages = 0
        self._transport = transport
        self._progress = progress
        self._timing = timing

    @contextmanager
    def of(self, kind: Kind, step: int) -> Iterator[None]:
        """Count what the communication inside the block costs. Arguments are those of ``Timing.begin``."""
        traffic = self._transport.traffic
        bytes_before, messages_before = traffic.bytes_sent, traffic.messages + traffic.collectives
        recording = timeline.active
        since = 0.0 if recording is None else recording.now()
        if not self._progress.has_ended:
            self._timing.begin(kind, step)
        try:
            with watched(self._transport, f"{_WAITS[kind]} {step}"):
                yield
        finally:
            if not self._progress.has_ended:
                self._timing.end()
            sent = traffic.bytes_sent - bytes_before
            if recording is not None:
                recording.span(_RECORDED[kind], since, {"inner step": step, "bytes sent": sent})
            self.bytes_sent += sent
            self.messages += traffic.messages + traffic.collectives - messages_before
