"""What the recipes of the papers share: the loop over epochs and steps, checkpoints, log and results."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar
from zlib import crc32

import numpy as np
from tqdm import tqdm

Data = TypeVar("Data")


class DataError(Exception):
    """The data is missing or damaged. The message says what to do."""


class Course(Protocol):
    """What is trained, on one rank: a model, its optimizer, and data.

    Attributes:
        optimizer: the optimizer with the method of the row around it.
        epochs: passes over the training data.
        steps: steps of each of them, equal on all ranks.
        settings: what the run depends on, in words, so that no run continues with other settings.
    """

    optimizer: Any
    epochs: int
    steps: int
    settings: str

    def batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        """This rank's batches of an epoch (from 0), from a step (from 0) on."""

    def train_on(self, batch: Any, epoch: int, step: int) -> Any:
        """Take a step. Returns the mean loss, which ``float`` can read."""

    def evaluate(self) -> dict[str, float]:
        """Figures of the average of all replicas after an epoch, equal on all ranks. Collective."""

    def final(self, history: list[dict[str, float]]) -> dict[str, float]:
        """Figures at the end of training, given those of the epochs; equal on all ranks. Collective."""

    def weights(self) -> list[Any]:
        """All weights and running statistics, as NumPy arrays."""


@dataclass
class Position:
    """Where a run is. With the checkpoint of the optimizer, it is all that a run continues from.

    Attributes:
        ranks: number of ranks.
        settings: those of the course.
        epoch: number of the epoch, from 0.
        step: steps of it that are done.
        losses: this rank's losses of these steps.
        history: results of the epochs that are complete.
    """

    ranks: int
    settings: str
    epoch: int = 0
    step: int = 0
    losses: list[Any] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


def read_together(lt: Any, read: Callable[[], Data]) -> Data:
    """Return the data. If a rank cannot read it, all of them end with its reason. Collective."""
    data, problem = None, None
    try:
        data = read()
    except (DataError, OSError) as error:
        problem = str(error)
    end_together(lt, problem)
    assert data is not None
    return data


def compare(lt: Any, checksum: str, what: str) -> None:
    """End the program on every rank if the ranks read different data. Collective."""
    checksums = lt.allgather_object(checksum)
    if len(set(checksums)) > 1:
        found = ", ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(checksums))
        raise SystemExit(f"{what} differ between the ranks, by checksum {found}: copy them again")


def end_together(lt: Any, problem: str | None) -> None:
    """End the program on every rank if one of them has a problem, in words. Collective."""
    ranks_of: dict[str, list[int]] = {}
    for rank, reason in enumerate(lt.allgather_object(problem)):
        if reason is not None:
            ranks_of.setdefault(reason, []).append(rank)
    if ranks_of:
        raise SystemExit("; ".join(f"rank {', '.join(map(str, ranks))}: {why}" for why, ranks in ranks_of.items()))


def resume(lt: Any, optimizer: Any, options: argparse.Namespace, start: Position) -> Position:
    """The position of the checkpoint, which is loaded into the optimizer, or ``start`` if there is none. Collective."""
    folder = options.output / "checkpoint"
    if not lt.broadcast_object((folder / "checkpoint.json").exists()):  # as rank 0 sees it
        return start
    found = Position(**lt.load(folder, optimizer))
    if found.settings != start.settings:
        raise SystemExit(f"{folder} is of a run with other settings: {found.settings}, not {start.settings}")
    if found.step and found.ranks != start.ranks:
        raise SystemExit(f"{folder} is in the middle of an epoch of {found.ranks} ranks: resume with as many")
    if lt.rank() == 0:
        print(f"resumed in epoch {found.epoch + 1} after {found.step} steps", flush=True)
    return replace(found, ranks=start.ranks)


def train(lt: Any, course: Course, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and write the log, checkpoints and results to ``options.output``.

    Returns the results, which are the same on every rank. Collective.
    """
    is_first = lt.rank() == 0
    log = course.optimizer.open_log(options.output) if options.output is not None else None
    at = Position(lt.size(), course.settings)
    if options.resume:
        at = resume(lt, course.optimizer, options, at)

    def save() -> None:
        at.losses = list(map(float, at.losses))
        if options.output is not None:
            lt.save(options.output / "checkpoint", course.optimizer, extra=asdict(at))

    while at.epoch < course.epochs:
        batches = tqdm(
            course.batches(at.epoch, at.step), f"epoch {at.epoch + 1}/{course.epochs}", course.steps,
            initial=at.step, unit="step", mininterval=0.5, disable=options.no_progress or not is_first,
        )  # fmt: skip
        for batch in batches:
            at.losses.append(course.train_on(batch, at.epoch, at.step))
            at.step += 1
            if options.save_every and at.step % options.save_every == 0 and at.step < course.steps:
                save()
        loss = float(np.mean(lt.allgather_object(float(np.mean(list(map(float, at.losses)))))))
        at.history.append({"loss": loss})
        if (at.epoch + 1) % options.evaluate_every == 0 or at.epoch + 1 == course.epochs:
            at.history[-1] |= course.evaluate()
        if log is not None:
            log.write(epoch=at.epoch + 1, **at.history[-1])
        if is_first:
            print(f"epoch {at.epoch + 1}: {in_words(at.history[-1])}", flush=True)
        at.epoch, at.step, at.losses = at.epoch + 1, 0, []
        save()

    figures = course.final(at.history)
    with course.optimizer.averaged():
        checksum = f"{crc32(b''.join(weight.tobytes() for weight in course.weights())):08x}"
    report = course.optimizer.report()
    results = {
        "preset": options.preset,
        "row": options.row,
        "recipe": asdict(options.recipe),
        "ranks": lt.size(),
        "seed": options.seed,
        **figures,
        "weights": checksum,
        "steps": report["inner_steps"],
        "rounds": report["rounds"],
        "bytes_sent_by_rank_0": report["bytes_sent"],
        "history": at.history,
    }
    if is_first:
        if options.output is not None:
            (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{in_words(figures)}, weights {checksum}", flush=True)
    return results


def in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
