"""Quantization, and outer steps over it, once more in a few lines of NumPy that share nothing with the library."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

BLOCK = 256
LEVELS = {"int8": 127, "int4": 7}
"""The largest integer of each coding."""


def quantized(v: Any, levels: int) -> Any:
    """What is read of a vector that was sent as integers from -levels to levels, with a scale for 256 elements."""
    out = np.empty_like(v)
    for start in range(0, v.size, BLOCK):
        block = v[start : start + BLOCK]
        scale = abs(block).max() / levels
        if scale < np.finfo(v.dtype).tiny:
            out[start : start + BLOCK] = 0
            continue
        unit = 2.0 ** (np.floor(np.log2(np.float64(scale))) - 16)  # 17 significant bits
        scale = (np.floor(np.float64(scale) / unit) * unit).astype(v.dtype)
        out[start : start + BLOCK] = np.rint(block / scale) * scale
    return out


def shards(size: int, ranks: int) -> list[slice]:
    """Whole blocks for each rank; the first ranks have one more."""
    counts = [len(part) for part in np.array_split(np.arange(-(-size // BLOCK)), ranks)]
    bounds = [min(int(bound) * BLOCK, size) for bound in np.cumsum([0, *counts])]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


class QuantizedRounds:
    """Outer steps of all ranks: each sends its quantized movement, and the results are quantized once more.

    Args:
        start: parameters at the start, one-dimensional.
        ranks: number of ranks.
        code: function that returns what is read of a vector that was sent.
    """

    def __init__(self, start: Any, ranks: int, code: Callable[[Any], Any]) -> None:
        self.anchor = start.copy()
        self.errors = [np.zeros_like(start) for _ in range(ranks)]
        self.own_errors = np.zeros_like(start)
        self.u = np.zeros_like(start)
        self.code = code if ranks > 1 else np.copy
        self.shards = shards(start.size, ranks)

    def end(
        self,
        x: Sequence[Any],
        factors: Sequence[float] | None = None,
        rule: Callable[["QuantizedRounds", Any], Any] = lambda rounds, mean: mean,
    ) -> Any:
        """Average the ranks' parameters. Returns what all ranks continue from."""
        factors = [1.0] * len(x) if factors is None else factors
        total = np.zeros_like(self.anchor)
        for rank, (own, factor) in enumerate(zip(x, factors, strict=True)):
            if factor:
                wanted = self.anchor.dtype.type(factor) * (own - self.anchor) + self.errors[rank]
                sent = np.concatenate([self.code(wanted[shard]) for shard in self.shards])
                self.errors[rank] = wanted - sent
                total += sent
        count = sum(factor > 0 for factor in factors)
        mean = (count * self.anchor + total) / count
        wanted = rule(self, mean) - self.anchor + self.own_errors
        sent = np.concatenate([self.code(wanted[shard]) for shard in self.shards])
        self.own_errors = wanted - sent
        self.anchor = self.anchor + sent
        return self.anchor
