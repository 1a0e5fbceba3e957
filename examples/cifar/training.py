"""What both frameworks share: the loop over epochs and steps, evaluation, checkpoints, log and results."""

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol
from zlib import crc32

import numpy as np
from archives import Data, DataError, load
from loader import Batch, Loader
from recipes import Recipe
from tqdm import tqdm

TEST_BATCH = 500


class Learner(Protocol):
    """A model and its optimizer in one framework."""

    optimizer: Any

    def step(self, batch: Batch, learning_rate: float) -> Any:
        """Train on a batch. Returns the mean loss, which ``float`` can read."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The sum of the losses, and the number of images that are classified correctly."""

    def weights(self) -> list[Any]:
        """All weights and running statistics, as NumPy arrays."""


@dataclass
class Position:
    """Where a run is. With the checkpoint of the optimizer, it is all that a run continues from.

    Attributes:
        ranks: number of ranks.
        settings: what the run depends on, in words, so that no run continues with other settings.
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


def load_data(lt: Any, options: argparse.Namespace) -> Data:
    """Read the dataset. If a rank cannot, all of them end with its reason. Collective."""
    data, problem = None, None
    try:
        data = load(options.recipe.dataset, options.data, any_size=options.any_size)
    except (DataError, OSError) as error:
        problem = str(error)
    by_rank = lt.allgather_object(problem)
    ranks_of: dict[str, list[int]] = {}
    for rank, reason in enumerate(by_rank):
        if reason is not None:
            ranks_of.setdefault(reason, []).append(rank)
    if ranks_of:
        raise SystemExit("; ".join(f"rank {', '.join(map(str, ranks))}: {why}" for why, ranks in ranks_of.items()))
    assert data is not None
    images, labels = data.train
    return replace(data, train=(images[: options.limit], labels[: options.limit]))


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


def evaluate(lt: Any, learner: Learner, data: Loader) -> tuple[float, float]:
    """Mean loss and accuracy of the average of all replicas, each rank on its shard. Collective."""
    with learner.optimizer.averaged():
        found = [(*learner.evaluate(batch), len(batch[1])) for batch in data.batches(0)]
    loss, correct, images = np.sum([np.sum(theirs, axis=0) for theirs in lt.allgather_object(found)], axis=0)
    return float(loss / images), float(correct / images)


def train(lt: Any, learner: Learner, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Train as the row says. Returns the results, which are the same on every rank. Collective."""
    recipe: Recipe = options.recipe
    is_first = lt.rank() == 0
    shard = {"mean": data.mean, "deviation": data.deviation, "rank": lt.rank(), "size": lt.size()}
    shuffled = Loader(data.train, **shard, batch_size=recipe.batch_size, seed=options.seed)
    in_order = Loader(data.train, **shard, batch_size=TEST_BATCH, augment=False)
    tests = Loader(data.test, **shard, batch_size=TEST_BATCH, augment=False)
    log = learner.optimizer.open_log(options.output) if options.output is not None else None

    at = Position(lt.size(), f"{recipe}, seed {options.seed}, limit {options.limit}")
    if options.resume:
        at = resume(lt, learner.optimizer, options, at)

    def save() -> None:
        at.losses = list(map(float, at.losses))
        if options.output is not None:
            lt.save(options.output / "checkpoint", learner.optimizer, extra=asdict(at))

    while at.epoch < recipe.epochs:
        batches = tqdm(
            shuffled.batches(at.epoch, at.step), f"epoch {at.epoch + 1}/{recipe.epochs}", shuffled.steps,
            initial=at.step, unit="step", mininterval=0.5, disable=options.no_progress or not is_first,
        )  # fmt: skip
        for batch in batches:
            rate = recipe.learning_rate(at.epoch, at.step, shuffled.steps, lt.size())
            at.losses.append(learner.step(batch, rate))
            at.step += 1
            if options.save_every and at.step % options.save_every == 0 and at.step < shuffled.steps:
                save()
        loss = float(np.mean(lt.allgather_object(float(np.mean(list(map(float, at.losses)))))))
        at.history.append({"loss": loss})
        if (at.epoch + 1) % options.evaluate_every == 0 or at.epoch + 1 == recipe.epochs:
            test_loss, accuracy = evaluate(lt, learner, tests)
            at.history[-1] |= {"test_loss": test_loss, "accuracy": accuracy}
        if log is not None:
            log.write(epoch=at.epoch + 1, **at.history[-1])
        if is_first:
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in at.history[-1].items())
            print(f"epoch {at.epoch + 1}: {numbers}", flush=True)
        at.epoch, at.step, at.losses = at.epoch + 1, 0, []
        save()

    training_loss, training_accuracy = evaluate(lt, learner, in_order)
    with learner.optimizer.averaged():
        checksum = f"{crc32(b''.join(weight.tobytes() for weight in learner.weights())):08x}"
    report = learner.optimizer.report()
    results = {
        "preset": options.preset,
        "row": options.row,
        "recipe": asdict(recipe),
        "ranks": lt.size(),
        "seed": options.seed,
        "training_loss": training_loss,
        "training_accuracy": training_accuracy,
        "accuracy": at.history[-1]["accuracy"],
        "best_accuracy": max(epoch.get("accuracy", 0.0) for epoch in at.history),
        "weights": checksum,
        "steps": report["inner_steps"],
        "rounds": report["rounds"],
        "bytes_sent_by_rank_0": report["bytes_sent"],
        "history": at.history,
    }
    if is_first:
        if options.output is not None:
            (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"training loss {training_loss:.4f}, accuracy {results['accuracy']:.4f}, weights {checksum}", flush=True)
    return results
