"""The order in which all ranks process tensors that each of them lists in an order of its own: that of their names."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lentando.comm import objects
from lentando.comm.agreement import fingerprint
from lentando.comm.checked_calls import CheckedCall
from lentando.comm.elastic import transaction
from lentando.comm.errors import MismatchError, grouped_by_rank, ranks_in_words
from lentando.comm.numbering import numbers_of
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of

__all__ = ["in_shared_order", "numbered"]

NAMES_SHOWN = 8
"""Limit of the names of each kind that a message about differing names lists."""


def in_shared_order(
    operation: str,
    described: Sequence[tuple[str, str]],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
) -> list[int]:
    """Sort tensors into an order that all ranks share, and check that all ranks have the same ones. Collective.

    Args:
        operation: description of the operation on the tensors, for messages.
        described: name of each tensor, and a description of its shape and dtype. Tensors of the same name are matched
            in the order in which they are listed.
        root_rank: root of the operation, equal on all ranks.
        process_set: the participating ranks.

    Returns:
        indices into ``described``.

    Raises:
        MismatchError: on every rank, if names or descriptions differ between ranks; names the ranks and differences.
    """
    world = transport_of(process_set)
    names = numbered([name for name, _ in described])
    in_order = sorted(zip(names, (description for _, description in described), range(len(names)), strict=True))
    listed = [[name, description] for name, description, _ in in_order]
    call = CheckedCall(world, operation, [f"from rank {root_rank}"], None)

    def attempt() -> None:
        call.agree()
        subject = np.array([fingerprint(listed)], np.int64)
        if (world.allgather(subject) != subject).any():
            by_rank = objects.allgather_object(world, listed)
            raise MismatchError(f"{operation}: {_differences(by_rank, numbers_of(world))}")

    call.run(lambda: transaction(world, attempt))
    return [number for _, _, number in in_order]


def numbered(names: Iterable[str]) -> list[str]:
    """The names, with a number appended to each that has occurred before: ``w``, ``w (2)``.

    Example:
        >>> numbered(["w", "b", "w"])
        ['w', 'b', 'w (2)']
    """
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _differences(by_rank: Sequence[Sequence[tuple[str, str]]], numbers: Sequence[int]) -> str:
    """Description of the tensors that ranks lack, or have in another shape or dtype.

    Args:
        by_rank: name and description of each tensor of each rank.
        numbers: numbers of these ranks in the whole job.
    """
    tables: list[dict[str, str]] = [dict(pairs) for pairs in by_rank]
    all_names = {name: None for table in tables for name in table}
    lacking = {
        name: tuple(rank for rank, table in zip(numbers, tables, strict=True) if name not in table)
        for name in all_names
    }
    sentences = []
    for ranks in sorted({ranks for ranks in lacking.values() if ranks}):
        missing = [name for name, by in lacking.items() if by == ranks]
        more = f" and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
        shown = ", ".join(map(repr, missing[:NAMES_SHOWN]))
        sentences.append(f"{shown}{more} not on {ranks_in_words(ranks)}")
    for name in all_names:
        if not lacking[name] and len({table[name] for table in tables}) > 1 and len(sentences) < NAMES_SHOWN:
            sentences.append(f"{name!r} is {grouped_by_rank([table[name] for table in tables], numbers)}")
    return f"the ranks' tensors differ: {'. '.join(sentences)}. Give tensors of the same names, shapes and dtypes"
