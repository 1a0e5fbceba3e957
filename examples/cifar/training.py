"""The image recipes on one rank, in both frameworks: batches, learning rates, and evaluation."""

import argparse
import sys
from pathlib import Path
from typing import Any, Protocol

import image_files
import numpy as np
from archives import Data, load
from jpeg_loader import JpegLoader
from loader import Batch, Loader, Shards
from recipes import Recipe

sys.path.append(str(Path(__file__).parents[1]))
import recipe_loop

TEST_BATCH = 500
AnyData = Data | image_files.FileData


class Learner(Protocol):
    """A model and its optimizer in one framework."""

    optimizer: Any

    def step(self, batch: Batch, learning_rate: float) -> Any:
        """Train on a batch. Returns the mean loss, which ``float`` can read."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The sum of the losses, and the number of images that are classified correctly."""

    def weights(self) -> list[Any]:
        """All weights and running statistics, as NumPy arrays."""


def load_data(lt: Any, options: argparse.Namespace) -> AnyData:
    """Read the dataset. If a rank cannot, all of them end with its reason. Collective."""

    def read() -> AnyData:
        if options.recipe.dataset == "imagenet":
            return image_files.load(options.data, any_size=options.any_size)
        return load(options.recipe.dataset, options.data, any_size=options.any_size)

    data = recipe_loop.read_together(lt, read)
    recipe_loop.compare(lt, data.checksum, f"images in {options.data}")
    return data.limited(options.limit)


class ImageCourse:
    """A row of the papers' tables on this rank."""

    def __init__(self, lt: Any, learner: Learner, data: AnyData, options: argparse.Namespace) -> None:
        recipe: Recipe = options.recipe
        shard = {"mean": data.mean, "deviation": data.deviation, "rank": lt.rank(), "size": lt.size()}

        def loader(part: Any, **given: Any) -> Shards:
            if isinstance(part, image_files.ImageFiles):
                return JpegLoader(part, **shard, **given, pixels=recipe.pixels, threads=options.threads)
            return Loader(part, **shard, **given)

        def loaders() -> tuple[Shards, Shards, Shards]:
            return (
                loader(data.train, batch_size=recipe.batch_size, seed=options.seed),
                loader(data.train, batch_size=TEST_BATCH, augment=False),
                loader(data.test, batch_size=TEST_BATCH, augment=False),
            )

        shuffled, self._in_order, self._tests = recipe_loop.read_together(lt, loaders)
        self._lt, self._learner, self._recipe = lt, learner, recipe
        self.optimizer, self.weights = learner.optimizer, learner.weights
        self.epochs, self.steps, self.batches = recipe.epochs, shuffled.steps, shuffled.batches
        self.settings = f"{recipe}, seed {options.seed}, images {data.checksum}"

    def train_on(self, batch: Batch, epoch: int, step: int) -> Any:
        rate = self._recipe.learning_rate(epoch, step, self.steps, self._lt.size())
        return self._learner.step(batch, rate)

    def evaluate(self) -> dict[str, float]:
        loss, accuracy = self._evaluate_on(self._tests)
        return {"test_loss": loss, "accuracy": accuracy}

    def final(self, history: list[dict[str, float]]) -> dict[str, float]:
        loss, accuracy = self._evaluate_on(self._in_order)
        return {
            "training_loss": loss,
            "training_accuracy": accuracy,
            "accuracy": history[-1]["accuracy"],
            "best_accuracy": max(epoch.get("accuracy", 0.0) for epoch in history),
        }

    def _evaluate_on(self, data: Shards) -> tuple[float, float]:
        """Mean loss and accuracy of the average of all replicas, each rank on its shard. Collective."""
        with self.optimizer.averaged():
            found = [(*self._learner.evaluate(batch), len(batch[1])) for batch in data.batches(0)]
        by_rank = [np.sum(theirs, axis=0) for theirs in self._lt.allgather_object(found)]
        loss, correct, images = np.sum(by_rank, axis=0)
        return float(loss / images), float(correct / images)


def train(lt: Any, learner: Learner, data: AnyData, options: argparse.Namespace) -> dict[str, Any]:
    """Train as the row says. Returns the results, which are the same on every rank. Collective."""
    return recipe_loop.train(lt, ImageCourse(lt, learner, data, options), options)
