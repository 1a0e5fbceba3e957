"""Batches of images for one rank: a shard of each epoch, augmented, the same on every run, from any position on."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from archives import DataError, Part
from numpy.typing import NDArray

PADDING = 4

Batch = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Normalized images of shape (count, channels, height, width), and labels of shape (count,)."""


class Shards:
    """Batches of one rank.

    Each epoch is a permutation of all images, the same on every rank, and is cut into steps times ranks batches, whose
    sizes differ by at most 1: no image is lost or repeated, and every rank has the same number of steps. What a batch
    contains depends on the seed, epoch, step and rank alone, so that the position within an epoch is a number.

    Args:
        count: number of images.
        mean: mean of the pixels of each channel, of white = 1.
        deviation: their standard deviation.
        batch_size: most images in a batch of a rank.
        rank: number of this rank.
        size: number of ranks.
        seed: seed of order and augmentation.
        augment: whether to shuffle the images and to change each at random.

    Raises:
        DataError: if there are too few images for so many ranks.
    """

    def __init__(
        self,
        count: int,
        mean: tuple[float, ...],
        deviation: tuple[float, ...],
        *,
        batch_size: int,
        rank: int,
        size: int,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        self._count = count
        self._scale = (1 / 255 / np.array(deviation, np.float32)).reshape(-1, 1, 1)
        self._shift = (np.array(mean, np.float32) / np.array(deviation, np.float32)).reshape(-1, 1, 1)
        self._rank, self._size, self._seed, self._augment = rank, size, seed, augment
        self.steps = -(-count // (batch_size * size))
        if count < self.steps * size:
            raise DataError(f"{count} images are too few for {size} ranks and batches of {batch_size}")

    def indices(self, epoch: int) -> list[NDArray[np.int64]]:
        """For each step of an epoch, the numbers of this rank's images."""
        order = np.arange(self._count)
        if self._augment:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        return np.array_split(order, self.steps * self._size)[self._rank :: self._size]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on. A thread makes the next one while this one is in use."""
        chosen = self.indices(epoch)

        def make(step: int) -> Batch | None:
            return self._batch(epoch, step, chosen[step]) if step < self.steps else None

        with ThreadPoolExecutor(1) as thread:
            later = thread.submit(make, first_step)
            for step in range(first_step, self.steps):
                batch = later.result()
                later = thread.submit(make, step + 1)
                assert batch is not None
                yield batch

    def _batch(self, epoch: int, step: int, chosen: NDArray[np.int64]) -> Batch:
        raise NotImplementedError

    def _normalized(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        normalized = images.astype(np.float32)
        normalized *= self._scale
        normalized -= self._shift
        return normalized


class Loader(Shards):
    """Batches of one rank, of images in memory, cropped from a border of 4 zeros and flipped at random.

    Args:
        part: images as uint8 of shape (count, channels, 32, 32), and labels.
        mean: mean of the pixels of each channel, of white = 1.
        deviation: their standard deviation.
        **shard: the other arguments of ``Shards``.
    """

    def __init__(self, part: Part, mean: tuple[float, ...], deviation: tuple[float, ...], **shard: Any) -> None:
        self._images, self._labels = part
        super().__init__(len(self._labels), mean, deviation, **shard)

    def _batch(self, epoch: int, step: int, chosen: NDArray[np.int64]) -> Batch:
        images = self._images[chosen]
        if self._augment:
            images = augmented(images, np.random.default_rng([self._seed, epoch, step, self._rank]))
        return self._normalized(images), self._labels[chosen].astype(np.int64)


def augmented(images: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Crops at random places of the images with a border of zeros, half of them flipped."""
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    tops, lefts = generator.integers(0, 2 * PADDING + 1, (2, count))
    flips = generator.random(count) < 0.5
    crops = np.empty_like(images)
    for crop, image, top, left, flip in zip(crops, padded, tops, lefts, flips, strict=True):
        window = image[:, top : top + height, left : left + width]
        crop[:] = window[:, :, ::-1] if flip else window
    return crops


if __name__ == "__main__":
    part = np.zeros((20_000, 3, 32, 32), np.uint8), np.zeros(20_000, np.uint8)
    loader = Loader(part, (0.5,) * 3, (0.25,) * 3, batch_size=128, rank=0, size=1)
    began = time.process_time()
    made = sum(len(labels) for _, labels in loader.batches(0))
    print(f"{made / (time.process_time() - began):,.0f} augmented images per second of one core's time")
