"""A sampler that divides what is left of an epoch among the present ranks."""

import random
from collections.abc import Iterator, Sized
from typing import Any

import torch

from lentando.comm.world import rank, size

__all__ = ["ElasticSampler"]


class ElasticSampler(torch.utils.data.Sampler[int]):
    """Samples this rank's part of the examples that no rank has processed in this epoch.

    As an attribute of a ``TorchState`` it is divided again whenever the state is synchronized. Call ``record_batch``
    after each batch, and ``set_epoch`` at the end of each epoch. All ranks have equally many examples: if their number
    is not divisible, the first ones of the order are repeated.

    Args:
        dataset: data set, of the same length on all ranks.
        shuffle: whether to shuffle the examples of an epoch, in the same way on all ranks.
        seed: seed of the order, equal on all ranks; the number of the epoch is added.

    Attributes:
        epoch: number of the epoch.
        processed_num: examples that all ranks together have processed in this epoch.
        remaining_indices: the others, in the order of this epoch.

    Example:
        >>> import lentando.torch as lt
        >>> lt.init()
        >>> sampler = lt.elastic.ElasticSampler(range(6), shuffle=False)
        >>> sampler.record_batch(0, 4)
        >>> sampler.reset()
        >>> list(sampler)
        [4, 5]
        >>> lt.shutdown()
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.processed_num = 0
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, of which nothing is processed. Called at the end of the epoch before.

        Args:
            epoch: number of the epoch that begins.
        """
        self.epoch = epoch
        self.processed_num = 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Record that every rank has processed a batch.

        Args:
            batch_idx: number of the batch; not used.
            batch_size: examples of the batch on this rank.
        """
        self.processed_num += batch_size * self.num_replicas

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how much of it is processed."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with what is left of an epoch, divided among the present ranks.

        Args:
            state_dict: result of ``state_dict()``.
        """
        self.epoch = state_dict["epoch"]
        self.processed_num = state_dict["processed_num"]
        self.reset()

    def reset(self) -> None:
        """Divide what is left of the epoch among the present ranks."""
        self.num_replicas = size()
        self.rank = rank()
        indices = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(indices)
        self.remaining_indices = indices[self.processed_num :]
        self.num_samples = -(-len(self.remaining_indices) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Every n-th of the remaining examples, beginning with the rank's number."""
        left = self.remaining_indices
        return iter([left[number % len(left)] for number in range(self.rank, self.total_size, self.num_replicas)])

    def __len__(self) -> int:
        return self.num_samples
