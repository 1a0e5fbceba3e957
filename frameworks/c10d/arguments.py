"""Checks of the tensors of a collective call on this rank, before it is submitted."""

from collections.abc import Sequence
from itertools import accumulate

import torch

__all__ = ["bounds", "check_counts", "check_dtypes", "check_lengths", "described"]


def described(tensors: Sequence[torch.Tensor]) -> list[str]:
    """The tensors in words, which ranks compare.

    Example:
        >>> described([torch.zeros(2, 3)])
        ['6 x float32']
    """
    return [f"{tensor.numel()} x {_name(tensor)}" for tensor in tensors]


def check_lengths(operation: str, tensors: Sequence[torch.Tensor], lengths: list[int]) -> None:
    """Check the number of tensors, and the number of elements of each.

    Args:
        operation: name of the call, for messages.
        tensors: the tensors.
        lengths: the numbers of elements that they must have.

    Raises:
        ValueError: for others.
    """
    found = [tensor.numel() for tensor in tensors]
    if found != lengths:
        raise ValueError(f"{operation}: expected tensors of {lengths} elements, got {found}")


def check_counts(operation: str, expected: int, **counts: int) -> None:
    """Check that lists have ``expected`` elements.

    Args:
        operation: name of the call, for messages.
        expected: the number of elements that each list must have.
        counts: the numbers found, by name of the list.

    Raises:
        ValueError: for another number.

    Example:
        >>> check_counts("alltoall", 3, inputs=3, outputs=2)
        Traceback (most recent call last):
        ValueError: alltoall: expected 3 outputs, got 2
    """
    for name, found in counts.items():
        if found != expected:
            raise ValueError(f"{operation}: expected {expected} {name}, got {found}")


def check_dtypes(operation: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Check that the inputs and outputs which belong together have one dtype: values are never converted.

    Args:
        operation: name of the call, for messages.
        inputs: the tensors that are read.
        outputs: the tensors that are filled.

    Raises:
        ValueError: for several dtypes.

    Example:
        >>> check_dtypes("gather", [torch.zeros(1, dtype=torch.float64)], [torch.zeros(1)])
        Traceback (most recent call last):
        ValueError: gather: expected inputs and outputs of one dtype, got inputs of float64 and outputs of float32
    """
    if len({tensor.dtype for tensor in (*inputs, *outputs)}) > 1:
        read, filled = ("/".join(sorted({_name(tensor) for tensor in tensors})) for tensors in (inputs, outputs))
        raise ValueError(
            f"{operation}: expected inputs and outputs of one dtype, got inputs of {read} and outputs of {filled}"
        )


def bounds(which: str, tensor: torch.Tensor, splits: list[int], size: int) -> list[int]:
    """Where the elements for each rank begin in a tensor of ``all_to_all_single``, and where the last ones end.

    Args:
        which: input or output, for messages.
        tensor: tensor whose rows are divided among the ranks.
        splits: numbers of rows, by rank; empty for equal ones.
        size: number of ranks.

    Raises:
        RuntimeError: if the splits do not fit the tensor or the ranks.

    Example:
        >>> bounds("input", torch.zeros(3, 2), [1, 2], 2)
        [0, 2, 6]
    """
    rows = tensor.size(0) if tensor.dim() else 1
    if not splits:
        if rows % size:
            raise RuntimeError(
                f"all_to_all_single: the {rows} rows of the {which} cannot be divided among {size} ranks"
            )
        splits = [rows // size] * size
    if len(splits) != size or sum(splits) != rows:
        raise RuntimeError(
            f"all_to_all_single: expected {size} split sizes of the {which} whose sum is its {rows} rows, got {splits}"
        )
    elements = tensor.numel() // rows if rows else 0
    return [0, *accumulate(elements * split for split in splits)]


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
