"""Faults of a job: drawn from a seed, written as one line, and injected by the rank concerned."""

import os
import signal
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

Moment = Literal["instant", "outer", "checkpoint"]
OPERATIONS = ("exchange", "allreduce", "broadcast", "allgather", "barrier", "vote", "repair")


class BrokenPromise(Exception):  # noqa: N818 - a promise of docs/reliability.md, not the program, is broken
    """A promise was broken. The message says which."""


def holds(claim: bool, otherwise: str) -> None:
    if not claim:
        raise BrokenPromise(otherwise)


@dataclass(frozen=True)
class Kill:
    """A rank gets SIGKILL.

    Attributes:
        rank: by its number when the job began.
        moment: "instant": from outside, ``share`` of a second's hundredth after the step has begun; "outer": at an
            operation of the transport in the outer step, or average of gradients, that ends the round of the step;
            "checkpoint": at a change to the file system in the first checkpoint from that step on.
        step: of training.
        number: of the operation, or the change.
        share: from 0 to 1.
    """

    rank: int
    moment: Moment
    step: int
    number: int
    share: float

    def __str__(self) -> str:
        return f"{self.rank}:{self.moment}@{self.step}#{self.number}+{self.share:.3f}"

    @classmethod
    def parse(cls, text: str) -> "Kill":
        rank, _, rest = text.partition(":")
        moment, _, rest = rest.partition("@")
        step, _, rest = rest.partition("#")
        number, _, share = rest.partition("+")
        assert moment in get_args(Moment)
        return cls(int(rank), moment, int(step), int(number), float(share))  # type: ignore[arg-type]

    @classmethod
    def draw(cls, random: Random, rank: int, moments: Iterable[Moment], first: int, last: int) -> "Kill":
        moment = random.choice(list(moments))
        return cls(rank, moment, random.randrange(first, last), random.randrange(8), round(random.random(), 3))


class SignalSender:
    """A process next to this one, which sends it signals from outside. Made before anything else is imported."""

    def __init__(self) -> None:
        reading, self._writing = os.pipe()
        if os.fork() == 0:
            os.close(self._writing)
            self._serve(reading, os.getppid())
        os.close(reading)

    def kill(self, after_seconds: float) -> None:
        os.write(self._writing, struct.pack("dd", after_seconds, -1.0))

    def stop(self, after_seconds: float, seconds: float) -> None:
        os.write(self._writing, struct.pack("dd", after_seconds, seconds))

    @staticmethod
    def _serve(reading: int, victim: int) -> None:
        with suppress(OSError), os.fdopen(reading, "rb", buffering=0) as orders:
            while order := orders.read(16):
                after_seconds, seconds = struct.unpack("dd", order)
                time.sleep(after_seconds)
                if seconds < 0:
                    os.kill(victim, signal.SIGKILL)
                else:
                    os.kill(victim, signal.SIGSTOP)
                    time.sleep(seconds)
                    os.kill(victim, signal.SIGCONT)
        os._exit(0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FaultInjector:
    """Carries out the kills of this rank."""

    def __init__(self, kills: Iterable[Kill], signal_sender: SignalSender, transport: Any, folder: Path) -> None:
        self._kills = list(kills)
        self._signal_sender = signal_sender
        self._folder = str(folder)
        self._operations_left: int | None = None
        self._changes_left: int | None = None
        for name in OPERATIONS:
            if hasattr(transport, name):
                setattr(transport, name, self._counted(getattr(transport, name)))
        sys.addaudithook(self._on_audit)

    def _counted(self, operation: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._operations_left is not None:
                if self._operations_left == 0:
                    die()
                self._operations_left -= 1
            return operation(*arguments, **options)

        return call

    def _on_audit(self, event: str, arguments: Any) -> None:
        if self._changes_left is None:
            return
        changes = event.startswith("os.r") or event == "os.mkdir" or (event == "open" and "w" in str(arguments[1]))
        if changes and self._folder in str(arguments[0]):
            if self._changes_left == 0:
                die()
            self._changes_left -= 1

    @contextmanager
    def step(self, step: int, ends_round: bool) -> Iterator[None]:
        """Around a step of training."""
        armed = False
        for kill in self._kills:
            if kill.moment == "instant" and kill.step == step:
                self._signal_sender.kill(kill.share * 0.01)
            elif kill.moment == "outer" and kill.step <= step and ends_round:
                self._operations_left, armed = kill.number, True
        yield
        if armed:
            die()  # it had fewer operations

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[None]:
        """Around the saving of a checkpoint."""
        armed = False
        for kill in self._kills:
            if kill.moment == "checkpoint" and kill.step <= step:
                self._changes_left, armed = kill.number, True
        yield
        if armed:
            die()
