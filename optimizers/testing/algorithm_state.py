"""Checks of a base algorithm's state, and of how it continues when ranks, values or the world size change."""

from typing import Any

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.rules.base_algorithm import DropsNonFinite, Recoverable, Resizable
from lentando.optimizers.testing.algorithm_averages import NEAR
from lentando.optimizers.testing.algorithm_ranks import AlgorithmSubject, Arrays, Rank, copies, is_near, mean_over_ranks

__all__ = ["check_drop", "check_recovery", "check_resizing", "check_state"]


def check_state(subject: AlgorithmSubject) -> None:
    """A run that is resumed from its state takes the same steps, bit by bit."""
    first, more = subject.size + 1, subject.size + 2

    def uninterrupted(rank: Rank) -> tuple[Arrays, Any, Arrays]:
        rank.run(first)
        state = copies(rank.hooks.state.state_dict())
        parameters = rank.parameters()
        rank.run(more)
        return parameters, state, rank.parameters()

    results = subject.run(uninterrupted)
    for rank, (_, state, _) in enumerate(results):
        subject.expect(
            (where := _not_plain(state, "state")) is None,
            f"state_dict must hold numbers, strings, lists, dicts with strings as keys, and arrays, but on rank {rank} "
            f"{where}",
        )

    def resumed(rank: Rank) -> Arrays:
        rank.hooks.state.load_state_dict(copies(results[rank.transport.rank][1]))
        rank.steps = first
        rank.run(more)
        return rank.parameters()

    again = subject.run(resumed, starts=[parameters for parameters, _, _ in results])
    for rank, (found, (_, _, expected)) in enumerate(zip(again, results, strict=True)):
        subject.expect(
            all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True)),
            f"a run resumed from state_dict must be bit-identical to an uninterrupted one, but differs on rank {rank}",
        )


def check_drop(subject: AlgorithmSubject) -> None:
    """Parameters of a rank that are not finite do not reach others, and are restored by those of others."""
    if not subject.base.mixes_parameters or subject.size == 1:
        return
    steps = 4 * subject.size + 4

    def work(rank: Rank) -> tuple[Arrays, Arrays] | None:
        if not isinstance(rank.hooks.steps, DropsNonFinite):
            return None
        try:
            rank.hooks.non_finite.allow_drop()
        except ConfigurationError:
            return None  # it says that it cannot: on_nonfinite="skip" is then refused
        start = rank.parameters()
        rank.step(is_still=True)
        if rank.transport.rank == 0:
            rank.fill([np.full(array.size, np.nan, array.dtype) for array in start])
        for _ in range(steps):
            if not all(np.isfinite(array.astype(np.float64)).all() for array in rank.parameters()):
                subject.expect(
                    rank.transport.rank == 0, "after drop_non_finite on rank 0, its values must not reach other ranks"
                )
                rank.hooks.non_finite.drop_non_finite()
            rank.step(is_still=True)
        rank.hooks.outer_average.wait_in_flight()
        return start, rank.parameters()

    results = [result for result in subject.run(work) if result is not None]
    if not results:
        return
    starts = [np.stack([start[number] for start, _ in results]).astype(np.float64) for number in range(3)]
    margins = [NEAR * float(np.abs(array).max()) for array in starts]
    for rank, (_, parameters) in enumerate(results):
        for array, start, margin in zip(parameters, starts, margins, strict=True):
            wide = array.astype(np.float64)
            is_between = (wide >= start.min(axis=0) - margin) & (wide <= start.max(axis=0) + margin)
            subject.expect(
                bool(is_between.all()),
                f"{steps} steps after drop_non_finite on rank 0, rank {rank} must have parameters between those of all "
                f"ranks, but has {wide[:3]}",
            )


def check_recovery(subject: AlgorithmSubject) -> None:
    """After the last rank has died, the others begin again from their parameters, though some were a step ahead."""
    if subject.size == 1:
        return
    steps, size = subject.size, subject.size - 1

    def until_failure(rank: Rank) -> tuple[Arrays, int]:
        rank.run(steps)
        rank.hooks.outer_average.wait_in_flight()
        return rank.parameters(), rank.hooks.recovery.begun_exchanges

    results = subject.run(until_failure)

    def after_failure(rank: Rank) -> tuple[Arrays, Arrays]:
        most = results[rank.transport.rank][1]
        is_behind = isinstance(rank.hooks.steps, Recoverable) and 0 < rank.transport.rank == size - 1
        begun = most - is_behind  # as if this rank had not begun its last exchange
        start = rank.parameters()
        rank.hooks.recovery.resume_after_failure(begun, most)
        before = rank.transport.traffic.copy()
        for _ in range(most - begun):
            rank.hooks.steps.after_step()
        subject.expect(
            rank.transport.traffic.messages == before.messages,
            "after resume_after_failure, steps that another rank has begun already must send nothing",
            size,
        )
        rank.transport.barrier()
        rank.run(2 * subject.size, is_still=True)
        return start, rank.prepared()

    resumed = subject.run(after_failure, [parameters for parameters, _ in results[:size]], size)
    found, expected = (mean_over_ranks([result[number] for result in resumed]) for number in (1, 0))
    for array, wanted, own in zip(found, expected, resumed[0][0], strict=True):
        subject.expect(
            is_near(array, wanted, own.dtype),
            f"after resume_after_failure, the mean must be that of the remaining ranks' parameters, {wanted[:3]}, but "
            f"is {array[:3]}",
            size,
        )


def check_resizing(subject: AlgorithmSubject) -> None:
    """A state is continued on another number of ranks, from the mean of the replicas."""

    def save(rank: Rank) -> tuple[Any, Arrays, Arrays, bool]:
        rank.run(subject.size + 1)
        state, parameters = copies(rank.hooks.state.state_dict()), rank.parameters()
        return state, parameters, rank.prepared(), isinstance(rank.hooks.steps, Resizable) or not state

    results = subject.run(save)
    if not all(is_resizable for *_, is_resizable in results):
        return  # the neutral default refuses to continue
    for size in sorted({max(1, subject.size - 1), subject.size + 1}):

        def resume(rank: Rank, size: int = size) -> tuple[Arrays, Arrays, Arrays]:
            prepared = []
            for saved, (state, parameters, expected, _) in enumerate(results):
                found = rank.hooks.resizing.prepared_average(copies(state), [array.copy() for array in parameters])
                prepared.append([a.astype(b.dtype) for a, b in zip(found, expected, strict=True)])
                subject.expect(
                    all(a.tobytes() == b.tobytes() for a, b in zip(prepared[-1], expected, strict=True)),
                    f"prepared_average must return what prepare_average left on rank {saved}, bit by bit",
                )
            mean = [a.astype(b.dtype) for a, b in zip(mean_over_ranks(prepared), prepared[0], strict=True)]
            rank.fill(mean)
            rank.hooks.state.load_state_dict(rank.hooks.resizing.state_for_average(copies(results[0][0]), mean))
            found = rank.prepared()
            rank.hooks.outer_average.abort_average()
            rank.run(2 * size, is_still=True)
            rank.hooks.outer_average.wait_in_flight()
            return mean, found, rank.parameters()

        for mean, found, later in subject.run(resume, size=size):
            subject.expect(
                all(a.tobytes() == b.tobytes() for a, b in zip(found, mean, strict=True)),
                f"the state of {subject.size} ranks must be continued from the average, but prepare_average changes it",
                size,
            )
            subject.expect(
                all(is_near(a, b.astype(np.float64), b.dtype, NEAR) for a, b in zip(later, mean, strict=True)),
                f"the state of {subject.size} ranks must be continued from the average, but steps without moves depart "
                "from it",
                size,
            )


def _not_plain(value: Any, where: str) -> str | None:
    """The first value within a state that a checkpoint cannot hold, described; None if there is none."""
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            return f"{where} has a key that is not a string"
        return next((text for key, item in value.items() if (text := _not_plain(item, f"{where}[{key!r}]"))), None)
    if isinstance(value, list | tuple):
        return next((text for n, item in enumerate(value) if (text := _not_plain(item, f"{where}[{n}]"))), None)
    if value is None or isinstance(value, bool | int | float | str | np.ndarray | np.generic):
        return None
    return f"{where} is a {type(value).__name__}"
