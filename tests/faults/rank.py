"""What one rank of a job does: trains while things go wrong as planned, checks what it can, and writes what it found.

Started by the program of this folder: ``python rank.py ORDER``, with the order as JSON.
"""

# ruff: noqa: E402

import os

from injection import BrokenPromise, FaultInjector, Kill, SignalSender, holds

SIGNAL_SENDER = SignalSender()  # a fork of a process that has loaded nothing yet
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainings import FRAMEWORKS, METHODS, PERIOD, Training

from lentando.comm import operations, world
from lentando.comm.errors import CheckpointError, NonFiniteError


def exists(folder: Path) -> bool:
    return any(folder.glob("step-*/checkpoint.json"))


class Rank:
    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.folder = Path(order["folder"])
        self.steps = order["steps"]
        self.make_training = FRAMEWORKS[order["framework"]]()
        world.init(**({"elastic": True} if order.get("elastic") else {}))
        self.identity = world.rank()
        self.victim = order["seed"] % world.size()
        self.found: list[dict[str, Any]] = []

    def run(self) -> None:
        (self.train if self.order["task"] == "train" else self.survivable_faults)()
        (self.folder / f"found-{self.identity}.json").write_text(json.dumps(self.found))
        world.shutdown()

    def make(self, method: str, **options: Any) -> Training:
        return self.make_training(method, Path(self.order["digits"]), self.identity, **options)  # type: ignore[call-arg]

    # --- a job that ranks of are killed in -------------------------------------------------------------------

    def train(self) -> None:
        """Train to the end, from the newest checkpoint if there is one, saving after every second round."""
        kills = [kill for kill in map(Kill.parse, self.order["kills"]) if kill.rank == self.identity]
        folder = self.folder / "checkpoints"
        for method in self.order["methods"]:
            training = self.make(method)
            if exists(folder):
                training.load(folder)
            resumed_at = training.steps
            injector = FaultInjector(kills, SIGNAL_SENDER, world.transport(), folder)
            while training.steps < self.steps:
                ends_round = training.steps % PERIOD == PERIOD - 1
                with injector.step(training.steps, ends_round):
                    training.step()
                if training.steps % (2 * PERIOD) == 0 and self.order.get("saves", True):
                    with injector.checkpoint(training.steps):
                        training.save(folder)
            self.report(method, "training", training, resumed_at=resumed_at)

    def report(self, method: str, case: str, training: Training, **more: Any) -> None:
        accuracy, average = training.averaged()
        own = {"accuracy": accuracy, "average": average, "checksum": training.checksum(), "steps": training.steps}
        place = {"size": world.size(), "rank": world.rank()}
        self.found.append({"method": method, "case": case, "broken": None, **own, **place, **more})

    # --- one job in which everything goes wrong that no rank dies of --------------------------------------------

    def survivable_faults(self) -> None:
        cases: list[Callable[[str], Any]] = [
            self.stopped, self.slow, self.uneven, self.not_a_number, self.not_a_number_left_out, self.corrupted_byte,
            self.full_disk,
        ]  # fmt: skip
        for method in METHODS:
            if method not in self.order["methods"]:
                continue
            self.reference = self.make(method)
            while self.reference.steps < self.steps:
                if self.reference.steps in (self.steps // 3, self.steps // 2):
                    self.reference.save(self.folder / method)
                self.reference.step()
            self.report(method, "undisturbed", self.reference)
            for case in cases:
                name = case.__name__.replace("_", " ")
                if name not in self.order["cases"]:
                    continue
                started = time.perf_counter()
                broken, detail = None, None
                try:
                    detail = case(method)
                except BrokenPromise as error:
                    broken = str(error)
                seconds = time.perf_counter() - started
                self.found.append(
                    {"method": method, "case": name, "broken": broken, "detail": detail, "seconds": seconds}
                )

    def is_victim(self) -> bool:
        return world.rank() == self.victim

    def same_as_undisturbed(self, training: Training) -> None:
        holds(training.steps == self.steps, f"ended after {training.steps} steps, expected {self.steps}")
        holds(
            training.checksum() == self.reference.checksum(), "the parameters are not those of the undisturbed training"
        )

    def to_the_end(self, training: Training) -> None:
        while training.steps < self.steps:
            training.step()

    def stopped(self, method: str) -> str:
        training = self.make(method)
        seconds = self.order["stop_seconds"]
        started = time.perf_counter()
        while training.steps < self.steps:
            if training.steps == self.steps // 2 and self.is_victim():
                SIGNAL_SENDER.stop(0.002 * (1 + self.order["seed"] % 5), seconds)
                self.wait_for_the_stop(seconds)
            training.step()
        self.same_as_undisturbed(training)
        holds(time.perf_counter() - started >= seconds, "no rank was stopped")
        return f"rank {self.victim} stood still for {seconds} s"

    def wait_for_the_stop(self, seconds: float) -> None:
        """Return once this process has stood still, as its clock shows: a late signal may find no step left."""
        before, until = time.perf_counter(), time.perf_counter() + seconds + 60
        while (now := time.perf_counter()) - before < seconds / 2:
            holds(now < until, "no rank was stopped")
            before = now
            time.sleep(0.001)

    def slow(self, method: str) -> str:
        training = self.make(method)
        while training.steps < self.steps:
            started = time.perf_counter()
            training.step()
            if self.is_victim():
                time.sleep(min(9 * (time.perf_counter() - started), 0.05))
        self.same_as_undisturbed(training)
        return f"rank {self.victim}"

    def uneven(self, method: str) -> str:
        training = self.make(method)
        with training.lt.join(training.optimizer):
            for _ in range(self.steps - 7 * ((world.rank() + self.victim) % world.size())):
                training.step()
        checksums = operations.allgather_object(training.checksum())
        holds(len(set(checksums)) == 1, f"the parameters differ between ranks: {checksums}")
        return self.accurate(training)

    def not_a_number(self, method: str) -> str:
        training = self.make(method)
        if self.is_victim():
            training.poisoned_at = self.steps // 2 + 2
        try:
            self.to_the_end(training)
        except NonFiniteError as error:
            text = str(error)
        else:
            raise BrokenPromise("a NaN on one rank was no error on another")
        holds("rank" in text, f"the error names no rank: {text}")
        if method == "allreduce":
            holds(training.is_finite(), "the parameters are not as they were")
        training.poisoned_at = None
        training.load(self.folder / method)
        self.to_the_end(training)
        self.same_as_undisturbed(training)
        return text.split(". ", maxsplit=1)[0]

    def not_a_number_left_out(self, method: str) -> str:
        training = self.make(method, on_nonfinite="skip")
        if self.is_victim():
            training.poisoned_at = self.steps // 2 + 2
        self.to_the_end(training)
        holds(training.is_finite(), "the parameters are not finite")
        return self.accurate(training)

    def accurate(self, training: Training) -> str:
        accuracy, undisturbed = training.averaged()[0], self.reference.averaged()[0]
        text = f"accuracy {accuracy:.4f}, undisturbed {undisturbed:.4f}"
        holds(accuracy >= undisturbed - 0.01, text)
        return text

    def corrupted_byte(self, method: str) -> str:
        folder = self.folder / method
        older, newest = sorted(path.parent for path in folder.glob("*/checkpoint.json"))
        files = sorted(newest.iterdir())
        file = files[self.order["seed"] % len(files)]
        kept = file.read_bytes()
        operations.barrier()
        if world.rank() == 0:
            data = bytearray(kept)
            data[self.order["seed"] * 7919 % len(data)] ^= 1 << self.order["seed"] % 8
            file.write_bytes(data)
        operations.barrier()
        training = self.make(method)
        before = training.checksum()
        try:
            training.load(folder)
        except CheckpointError as error:
            text = str(error)
        else:
            raise BrokenPromise(f"{file.name} was damaged, and loaded all the same")
        finally:
            operations.barrier()
            if world.rank() == 0:
                file.write_bytes(kept)
        holds(training.checksum() == before, "the parameters have changed in an attempt to load that failed")
        training.load(older)
        holds(training.steps == self.steps // 3, f"resumed at step {training.steps}")
        self.to_the_end(training)
        self.same_as_undisturbed(training)
        return text.splitlines()[0][-80:]

    def full_disk(self, method: str) -> str:
        disk = Path(self.order["disk"]) if self.order["disk"] else self.folder / "limited"
        folder, ballast = disk / method, disk / "ballast"
        training = self.make(method)
        while training.steps < self.steps // 2:
            training.step()
        training.save(folder)
        training.step()
        operations.barrier()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not self.order["disk"]:
            if self.is_victim():
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        elif world.rank() == 0:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(256)) == 256:
                        pass
                except OSError:
                    pass
        operations.barrier()
        try:
            training.save(folder)
        except CheckpointError as error:
            text = str(error)
        else:
            raise BrokenPromise("the disk was full, and a checkpoint was saved all the same")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        operations.barrier()
        again = self.make(method)
        again.load(folder)
        holds(again.steps == self.steps // 2, f"resumed at step {again.steps}")
        self.to_the_end(again)
        self.same_as_undisturbed(again)
        operations.barrier()
        if world.rank() == 0:
            ballast.unlink(missing_ok=True)
        operations.barrier()
        training.save(folder)
        return text.splitlines()[0][-80:]


if __name__ == "__main__":
    Rank(json.loads(sys.argv[1])).run()
