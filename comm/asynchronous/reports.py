"""What is wrong with the operations that ranks have submitted, in words."""

import json
from collections.abc import Collection, Mapping, Sequence

from lentando.comm.errors import grouped_by_rank, ranks_in_words

__all__ = ["deadlock", "different", "joined", "shortened", "waits_for"]


def different(key: str, by_rank: Mapping[int, str], numbers: Sequence[int]) -> str | None:
    """Report that ranks have submitted different operations under one name; None if they are equal.

    Args:
        key: the name.
        by_rank: the operation with its arguments as JSON, by rank.
        numbers: numbers of the ranks in the job.
    """
    if len(set(by_rank.values())) == 1:
        return None
    ranks = sorted(by_rank)
    found = grouped_by_rank([_described(by_rank[rank]) for rank in ranks], [numbers[rank] for rank in ranks])
    return (
        f"the ranks submit different operations under the name {key!r}. {found}. Operation, shape, dtype and all "
        "settings of an asynchronous operation must be equal on all ranks"
    )


def joined(description: str, ranks: Collection[int], numbers: Sequence[int]) -> str | None:
    """Report that an operation needs the values of ranks that have joined; None if they can contribute zeros.

    Args:
        description: the operation with its arguments as JSON.
        ranks: ranks that have joined.
        numbers: numbers of the ranks in the job.
    """
    if not ranks:
        return None
    operation, *arguments = json.loads(description)
    is_sum = operation in ("allreduce", "grouped_allreduce") and any(op in arguments for op in ("sum", "average"))
    if is_sum or operation == "barrier":
        return None
    have = f"{ranks_in_words(sorted(numbers[rank] for rank in ranks))} {'has' if len(ranks) == 1 else 'have'}"
    return (
        f"{_described(description)} needs the values of all ranks, but {have} called join(), and can "
        "contribute zeros to sums and averages only"
    )


def waits_for(keys: Sequence[str], submitted: Mapping[str, Collection[int]], numbers: Sequence[int]) -> str:
    """What a rank waits for, and which ranks have not submitted it.

    Args:
        keys: names of the operations.
        submitted: ranks that have submitted each operation, by name.
        numbers: numbers of the ranks in the job.
    """
    texts = []
    for key in keys:
        absent = [number for rank, number in enumerate(numbers) if rank not in submitted.get(key, ())]
        texts.append(f"{key!r}" + (f" (not submitted by {ranks_in_words(absent)})" if absent else ""))
    return f"waits for {shortened(texts)}"


def deadlock(texts: Sequence[str], numbers: Sequence[int]) -> str:
    """Report that all ranks wait for others.

    Args:
        texts: what each rank does, in words.
        numbers: numbers of the ranks in the job.
    """
    return (
        f"all ranks wait, and none can continue. {grouped_by_rank(texts, numbers)}. Every rank must submit the same "
        "operations, under the same names, before it waits for one of them or for something else that needs all ranks"
    )


def shortened(texts: Sequence[str], most: int = 5) -> str:
    """Enumerate texts, the first of them if they are many.

    Example:
        >>> shortened(["a", "b", "c", "d"], 2)
        'a, b and 2 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return f"{', '.join(texts[:most])}{more}"


def _described(description: str) -> str:
    operation, *arguments = json.loads(description)
    return f"{operation}({', '.join(map(str, arguments))})"
