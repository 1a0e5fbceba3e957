"""Checks of a base algorithm's parameters over many steps, and around exact averages."""

from functools import partial
from typing import Any

import numpy as np

from lentando.optimizers.testing.algorithm_ranks import AlgorithmSubject, Arrays, Rank, is_near, mean_over_ranks

__all__ = ["check_abort", "check_consensus", "check_mean", "check_outer_average", "check_rebase"]

NEAR = 0.05
"""Relative distance from the consensus that messages in 16 bits may cause."""


def check_mean(subject: AlgorithmSubject) -> None:
    """Mixing conserves the mean: after ``prepare_average``, it is that of the starting parameters and all moves."""

    def work(rank: Rank) -> tuple[Arrays, Arrays]:
        start = [array.astype(np.float64) for array in rank.parameters()]
        moves = rank.run(2 * subject.size + 1)
        return [a + b for a, b in zip(start, moves, strict=True)], rank.prepared()

    results = subject.run(work)
    _expect_near(
        subject,
        mean_over_ranks([found for _, found in results]),
        mean_over_ranks([expected for expected, _ in results]),
        [array.dtype for array in results[0][1]],
        "the mean over ranks must be conserved by mixing, messages in flight included, and be that of the arrays "
        "after prepare_average",
    )


def check_consensus(subject: AlgorithmSubject) -> None:
    """Steps without moves bring replicas that mix parameters closer to each other."""
    if not subject.base.mixes_parameters or subject.size == 1:
        return

    def work(rank: Rank) -> tuple[Arrays, Arrays]:
        start = rank.parameters()
        rank.run(10 * subject.size, is_still=True)
        rank.hooks.outer_average.wait_in_flight()
        return start, rank.parameters()

    results = subject.run(work)
    before, after = (_spread([arrays[number] for arrays in results]) for number in (0, 1))
    subject.expect(
        after < before / 2,
        f"mixing must bring the replicas closer to each other, but after {10 * subject.size} steps without moves they "
        f"are {after:.3g} apart, and were {before:.3g}",
    )


def check_outer_average(subject: AlgorithmSubject) -> None:
    """After an exact average all ranks have the same bits, and continue from these parameters."""

    def work(rank: Rank) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        rank.run(subject.size + 1)
        consensus = rank.outer_average()
        adopted = rank.parameters()
        prepared = rank.prepared()
        rank.hooks.outer_average.abort_average()
        rank.run(2 * subject.size, is_still=True)
        rank.hooks.outer_average.wait_in_flight()
        return consensus, adopted, prepared, rank.parameters()

    results = subject.run(work)
    for rank, (consensus, adopted, prepared, later) in enumerate(results):
        for number, expected in enumerate(results[0][0]):
            subject.expect(
                consensus[number].tobytes() == adopted[number].tobytes() == expected.tobytes(),
                f"after adopt_consensus, rank {rank} does not have the average, bit by bit",
            )
            subject.expect(
                prepared[number].tobytes() == expected.tobytes(),
                f"prepare_average right after adopt_consensus must leave the average as it is, bit by bit, but does "
                f"not on rank {rank}",
            )
            subject.expect(
                is_near(later[number], expected.astype(np.float64), expected.dtype, NEAR),
                f"after adopt_consensus, steps without moves must stay at the average, but rank {rank} has "
                f"{later[number][:3].astype(np.float64)} in place of {expected[:3].astype(np.float64)}",
            )


def check_abort(subject: AlgorithmSubject) -> None:
    """``abort_average`` undoes ``prepare_average``, and later steps do not notice either."""

    def work(rank: Rank, has_abort: bool) -> tuple[bool, Arrays]:
        rank.run(subject.size + 1)
        rank.hooks.outer_average.wait_in_flight()
        before = rank.parameters()
        if has_abort:
            rank.hooks.outer_average.prepare_average()
            rank.hooks.outer_average.abort_average()
        is_restored = all(a.tobytes() == b.tobytes() for a, b in zip(rank.parameters(), before, strict=True))
        rank.run(2)
        return is_restored, rank.parameters()

    with_abort, without = (subject.run(partial(work, has_abort=has_abort)) for has_abort in (True, False))
    for rank, ((is_restored, found), (_, expected)) in enumerate(zip(with_abort, without, strict=True)):
        subject.expect(
            is_restored, f"abort_average must restore the parameters, bit by bit, but does not on rank {rank}"
        )
        subject.expect(
            all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True)),
            f"steps after abort_average must be those without prepare_average, but differ on rank {rank}",
        )


def check_rebase(subject: AlgorithmSubject) -> None:
    """``rebase_on_model`` continues from parameters that were changed on each rank."""

    def work(rank: Rank) -> tuple[Arrays, Arrays]:
        rank.run(subject.size)
        rank.outer_average()
        changed = [np.full(array.size, 1 + rank.transport.rank, array.dtype) for array in rank.parameters()]
        rank.fill(changed)
        rank.hooks.outer_average.rebase_on_model()
        return changed, rank.prepared()

    results = subject.run(work)
    _expect_near(
        subject,
        mean_over_ranks([found for _, found in results]),
        mean_over_ranks([changed for changed, _ in results]),
        [array.dtype for array in results[0][1]],
        "after rebase_on_model, the mean must be that of the changed parameters",
    )


def _expect_near(
    subject: AlgorithmSubject, found: Arrays, expected: Arrays, dtypes: list[np.dtype[Any]], promise: str
) -> None:
    for array, wanted, dtype in zip(found, expected, dtypes, strict=True):
        subject.expect(
            is_near(array, wanted, dtype), f"{promise}: expected {wanted[:3]}, found {array[:3]} in buffers of {dtype}"
        )


def _spread(by_rank: list[Arrays]) -> float:
    """Largest difference between two ranks, in any element."""
    stacked = [np.stack([array.astype(np.float64) for array in arrays]) for arrays in zip(*by_rank, strict=True)]
    return max(float((array.max(axis=0) - array.min(axis=0)).max()) for array in stacked)
