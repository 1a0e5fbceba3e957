"""Rules that make one tensor of another, or a part of one, by permuting, splitting and joining axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias, get_args

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["Ranges", "WeightRule", "extent", "part_in_words", "slices"]

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""A part of a tensor: for each axis, the first index and the index after the last one."""
Use: TypeAlias = Literal["copied", "added", "zero"]


@dataclass(frozen=True)
class WeightRule:
    """A rule that makes one tensor, or a part of one, of another tensor or a part of it.

    Most rules permute axes at most. A dense layer that follows a flattened feature map needs more: one of its axes
    stands for several, which the other framework flattens in another order. ``split`` splits such axes, ``axes``
    permutes the pieces, and ``merge`` joins neighbours again:

        WeightRule("out.weight", "out/kernel", split=((10,), (32, 4, 4)), axes=(2, 3, 1, 0), merge=(3, 1))

    turns (10, 512), channels first, into (512, 10), channels last.

    ``source_part`` and ``target_part`` restrict a rule to a part of a tensor; several rules then make up the whole. For
    a dense layer whose input is 8 other features followed by that map, these two permute the last 512 rows only:

        WeightRule("out.weight", "out/kernel", axes=(1, 0),
                   source_part=((0, 10), (0, 8)), target_part=((0, 8), (0, 10)))
        WeightRule("out.weight", "out/kernel", axes=(2, 3, 1, 0), split=((10,), (32, 4, 4)), merge=(3, 1),
                   source_part=((0, 10), (8, 520)), target_part=((8, 520), (0, 10)))

    Args:
        source: name of the tensor in the checkpoint, or in the first of two models.
        target: name of the tensor in the model, or in the second of two models.
        axes: permutation, after splitting: axis k of the target is axis ``axes[k]`` of the source. None permutes
            nothing.
        split: lengths into which each axis of the source is split; None splits nothing.
        merge: number of pieces that are joined to each axis of the target (0 for an axis of length 1); None joins
            nothing.
        source_part: part of the source that is used: for each axis, the first index and the index after the last one.
            None uses all of it.
        target_part: part of the target that the rule makes, in the same form.
        use: "copied"; "added" adds the source to the target of another rule (an LSTM has two biases in PyTorch, whose
            sum is the one of Keras); "zero" makes zeros where the inverse rule adds. Of tensors whose values are added,
            the base optimizer's state is averaged, and copied in the other direction: they have the same gradient.

    Raises:
        ConfigurationError: if ``axes`` is no permutation, or does not fit the pieces.

    Example:
        >>> import numpy as np
        >>> from lentando.optimizers.checkpoint.weight_map import WeightRule
        >>> rule = WeightRule("conv.weight", "conv/kernel", axes=(2, 3, 1, 0))
        >>> rule.apply(np.zeros((32, 3, 5, 5))).shape
        (5, 5, 3, 32)
        >>> rule.inverse.apply(np.zeros((5, 5, 3, 32))).shape
        (32, 3, 5, 5)
    """

    source: str
    target: str
    axes: tuple[int, ...] | None = None
    split: tuple[tuple[int, ...], ...] | None = None
    merge: tuple[int, ...] | None = None
    source_part: Ranges | None = None
    target_part: Ranges | None = None
    use: Use = "copied"

    def __post_init__(self) -> None:
        pieces = None if self.split is None else sum(map(len, self.split))
        if self.axes is not None and sorted(self.axes) != list(range(len(self.axes))):
            raise ConfigurationError(f"axes of {self.source!r} must be a permutation of 0, 1, ..., got {self.axes}")
        if pieces is not None and self.axes is not None and pieces != len(self.axes):
            raise ConfigurationError(
                f"{self.source!r} is split into {pieces} axes {self.split}, but axes {self.axes} permutes "
                f"{len(self.axes)}"
            )
        if self.merge is not None and (
            self.split is None or sum(self.merge) != pieces or any(count < 0 for count in self.merge)
        ):
            raise ConfigurationError(
                f"merge of {self.source!r} must count each part of split once, got {self.merge} for {self.split}"
            )
        for name, part in ((self.source, self.source_part), (self.target, self.target_part)):
            if part is not None and any(not 0 <= start < stop for start, stop in part):
                raise ConfigurationError(
                    f"a part of {name!r} must be (first index, index after the last) for each axis, got {part}"
                )
        if self.use not in get_args(Use):
            raise ConfigurationError(f"use must be one of {get_args(Use)}, got {self.use!r}")

    @property
    def inverse(self) -> "WeightRule":
        """The rule from the target to the source."""
        axes = None if self.axes is None else tuple(int(axis) for axis in np.argsort(self.axes))
        split = None if self.split is None else self._target_split()
        merge = None if self.split is None else tuple(map(len, self.split))
        opposite: dict[Use, Use] = {"copied": "copied", "added": "zero", "zero": "added"}
        return WeightRule(
            self.target, self.source, axes, split, merge, self.target_part, self.source_part, opposite[self.use]
        )

    @property
    def key(self) -> str:
        """Name of what the rule makes: the target, or for example ``"kernel[0:8, 0:10]"`` for a part of it."""
        added = f" + {self.source}" if self.use == "added" else ""
        return f"{self.target}{part_in_words(self.target_part)}{added}"

    def shape(self, source_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what the rule makes.

        Args:
            source_shape: shape of the source.

        Raises:
            ConfigurationError: if the rule does not fit this shape.
        """
        pieces = self.parts(source_shape)
        permuted = pieces if self.axes is None else tuple(pieces[axis] for axis in self.axes)
        return permuted if self.split is None else tuple(map(prod, self._target_split()))

    def parts(self, source_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the source, or of its part, after splitting.

        Args:
            source_shape: shape of the source.

        Raises:
            ConfigurationError: if the rule does not fit this shape.
        """
        shape = tuple(source_shape)
        if self.source_part is not None:
            if len(self.source_part) != len(shape) or any(
                stop > length for (_, stop), length in zip(self.source_part, shape, strict=False)
            ):
                raise ConfigurationError(
                    f"{self.source!r} has shape {shape}, which does not have the part {self.source_part}"
                )
            shape = extent(self.source_part)
        if self.split is not None:
            if tuple(map(prod, self.split)) != shape:
                raise ConfigurationError(f"{self.source!r} has shape {shape}, which cannot be split as {self.split}")
            return tuple(length for axis in self.split for length in axis)
        if self.axes is not None and len(self.axes) != len(shape):
            raise ConfigurationError(f"{self.source!r} has shape {shape}, to which axes {self.axes} do not fit")
        return shape

    def apply(self, array: Array) -> Array:
        """The values that the rule makes of those of the source. They share memory where possible."""
        return self.permuted(array).reshape(self.shape(array.shape))

    def permuted(self, array: Array) -> Array:
        """The values before pieces are joined: always a view if ``array`` is contiguous."""
        pieces = self.parts(array.shape)
        if self.source_part is not None:
            array = array[slices(self.source_part)]
        array = array.reshape(pieces)
        return array if self.axes is None else array.transpose(self.axes)

    def as_python(self) -> str:
        """The call that creates this rule, to be pasted into a program."""
        names = ("axes", "split", "merge", "source_part", "target_part")
        settings = [f", {name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        use = "" if self.use == "copied" else f", use={self.use!r}"
        return f"lt.WeightRule({self.source!r}, {self.target!r}{''.join(settings)}{use})"

    def _target_split(self) -> tuple[tuple[int, ...], ...]:
        assert self.split is not None
        parts = [length for axis in self.split for length in axis]
        permuted = parts if self.axes is None else [parts[axis] for axis in self.axes]
        counts = (1,) * len(permuted) if self.merge is None else self.merge
        starts = [sum(counts[:number]) for number in range(len(counts))]
        return tuple(tuple(permuted[start : start + count]) for start, count in zip(starts, counts, strict=True))


def extent(part: Ranges) -> tuple[int, ...]:
    """The shape of a part of a tensor."""
    return tuple(stop - start for start, stop in part)


def slices(part: Ranges) -> tuple[slice, ...]:
    """The index that selects a part of an array."""
    return tuple(slice(*axis) for axis in part)


def part_in_words(part: Ranges | None) -> str:
    """A part of a tensor as text, for example ``"[0:8, 0:10]"``; empty for a whole tensor."""
    return "" if part is None else f"[{', '.join(f'{start}:{stop}' for start, stop in part)}]"
