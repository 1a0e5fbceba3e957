"""Batches of sentence pairs for one rank: as many pairs of similar length as fit into a number of sub-words."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from parallel_text import DataError, Pairs, load

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Sub-words of the sentences and of their translations, each of shape (pairs, longest of them)."""


class TokenBatches:
    """Batches of one rank.

    The pairs are sorted by the length of their longer side, those of one length in an order of the epoch, and cut into
    batches: each has at most ``batch_tokens`` sub-words on either side, padding included. The ranks' batches of a step
    are neighbours, so that they take equally long; the steps come in an order of the epoch. No pair is lost or
    repeated, and every rank has the same number of steps in every epoch. What a batch contains depends on the seed,
    epoch, step and rank alone, so that the position within an epoch is a number.

    Args:
        pairs: all sentence pairs.
        batch_tokens: most sub-words of a batch of a rank, on either side.
        rank: number of this rank.
        size: number of ranks.
        seed: seed of the order.
        shuffle: whether the order is random. If not, it is that of the lengths.

    Raises:
        DataError: if there are too few pairs for so many ranks, or a pair does not fit into a batch.
    """

    def __init__(
        self, pairs: Pairs, *, batch_tokens: int, rank: int, size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self._pairs, self._rank, self._size, self._seed, self._shuffle = pairs, rank, size, seed, shuffle
        self._lengths = pairs.lengths
        if self._lengths.max(initial=0) > batch_tokens:
            raise DataError(
                f"a sentence of {self._lengths.max()} sub-words does not fit into batches of {batch_tokens}"
            )
        counts = _counts(np.sort(self._lengths), batch_tokens)
        self.steps = -(-len(counts) // size)
        if self.steps * size > len(pairs) or not counts:
            raise DataError(f"{len(pairs)} sentence pairs are too few for {size} ranks and batches of {batch_tokens}")
        while len(counts) < self.steps * size:  # where batches are missing to the last step, the largest are halved
            largest = max(range(len(counts)), key=counts.__getitem__)
            half = counts[largest] // 2
            counts[largest : largest + 1] = [half, counts[largest] - half]
        self._ends = np.cumsum(counts)

    def indices(self, epoch: int) -> list[NDArray[np.int64]]:
        """For each step of an epoch, the numbers of this rank's pairs."""
        order = np.arange(len(self._pairs))
        steps = np.arange(self.steps)
        if self._shuffle:
            generator = np.random.default_rng([self._seed, epoch])
            order, steps = generator.permutation(order), generator.permutation(steps)
        order = order[np.argsort(self._lengths[order], kind="stable")]
        batches = np.split(order, self._ends[:-1])
        return [batches[step * self._size + self._rank] for step in steps]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on."""
        for chosen in self.indices(epoch)[first_step:]:
            yield self._pairs.source.padded(chosen), self._pairs.target.padded(chosen)


def _counts(lengths: NDArray[np.int64], batch_tokens: int) -> list[int]:
    """How many pairs, in ascending order of length, each batch takes."""
    counts, count = [], 0
    for length in lengths.tolist():
        if (count + 1) * length > batch_tokens:
            counts.append(count)
            count = 0
        count += 1
    return [*counts, count] if count else counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the speed at which one rank's batches are made.")
    parser.add_argument("--data", type=Path, default=Path("data/gettext-en-de"), metavar="DIR")
    pairs = load(parser.parse_args().data, "en", "de").train
    loader = TokenBatches(pairs, batch_tokens=25_000, rank=0, size=1)
    began = time.process_time()
    made = sum(np.count_nonzero(target) for _, target in loader.batches(0))
    print(f"{made / (time.process_time() - began):,.0f} sub-words of translations per second of one core's time")
