"""Checks of what a base algorithm declares, and of its two step hooks."""

import numpy as np

from lentando.comm.transport import Array
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.testing.algorithm_ranks import AlgorithmSubject, Arrays, Rank, is_near

__all__ = [
    "check_binding",
    "check_communication",
    "check_description",
    "check_gradient_average",
    "check_mixing",
    "check_partial_gradient_average",
    "check_single_rank",
]

DECLARATIONS = ("averages_gradients", "communicates", "mixes_parameters")


def check_description(subject: AlgorithmSubject) -> None:
    """All declarations exist and do not contradict each other, and descriptions can be compared."""
    base = subject.base
    for name in DECLARATIONS:
        value = getattr(base, name, None)
        subject.expect(isinstance(value, bool), f"{name} must be True or False, found {value!r}")
    subject.expect(callable(getattr(base, "bind", None)), "it lacks the method bind")
    subject.expect(base == subject.base, "two descriptions of equal settings must be equal: use a frozen dataclass")
    acts = base.averages_gradients or base.mixes_parameters
    subject.expect(
        base.communicates == acts,
        f"communicates is {base.communicates}, but averages_gradients is {base.averages_gradients} and "
        f"mixes_parameters is {base.mixes_parameters}: it must be True exactly if one of these is",
    )


def check_binding(subject: AlgorithmSubject) -> None:
    """``bind`` leaves the buffers alone, and the bound algorithm has whole protocols."""

    def work(rank: Rank) -> bool:
        bound = rank.hooks.steps
        for name in ("average_gradients", "after_step"):
            subject.expect(callable(getattr(bound, name, None)), f"{type(bound).__name__} lacks the step hook {name}")
        return rank.is_changed_by_bind

    subject.expect(not any(subject.run(work)), "bind must not change the buffers")


def check_communication(subject: AlgorithmSubject) -> None:
    """Steps send something exactly if ``communicates``."""

    def work(rank: Rank) -> tuple[int, int]:
        before = rank.transport.traffic.copy()
        steps = 2 * subject.size
        rank.run(steps)
        after = rank.transport.traffic
        return after.messages - before.messages, after.collectives - before.collectives - steps  # without barriers

    sent = sum(messages + collectives for messages, collectives in subject.run(work))
    if subject.base.communicates and subject.size > 1:
        subject.expect(sent > 0, f"communicates is True, but {2 * subject.size} steps sent nothing")
    else:
        subject.expect(
            not (sent and not subject.base.communicates), f"communicates is False, but the steps sent {sent} messages"
        )


def check_gradient_average(subject: AlgorithmSubject) -> None:
    """``average_gradients`` leaves the mean over all ranks, the same bits on each, and no parameter changes."""
    if not subject.base.averages_gradients:
        return

    def work(rank: Rank) -> tuple[Arrays, Arrays, bool]:
        rank.fill_gradients()
        own, parameters = [buffer.array.copy() for buffer in rank.gradients], rank.parameters()
        rank.hooks.steps.average_gradients()
        is_untouched = all(_is_same(a, b) for a, b in zip(rank.parameters(), parameters, strict=True))
        return own, [buffer.array.copy() for buffer in rank.gradients], is_untouched

    results = subject.run(work)
    subject.expect(all(is_untouched for *_, is_untouched in results), "average_gradients must not change parameters")
    _expect_mean(subject, [own for own, *_ in results], [found for _, found, _ in results], "average_gradients()")


def check_partial_gradient_average(subject: AlgorithmSubject) -> None:
    """``average_gradients(partial_average)`` leaves the mean over the active ranks, on all ranks."""
    if not subject.base.averages_gradients or subject.size == 1:
        return

    def work(rank: Rank) -> tuple[Arrays, Arrays]:
        rank.fill_gradients()
        own = [buffer.array.copy() for buffer in rank.gradients]
        is_active = rank.transport.rank != 0
        rank.hooks.steps.average_gradients(PartialAverage(is_active, subject.size - 1, subject.size))
        return own, [buffer.array.copy() for buffer in rank.gradients]

    results = subject.run(work)
    own, found = [own for own, _ in results[1:]], [found for _, found in results]
    _expect_mean(subject, own, found, "average_gradients() with a PartialAverage that leaves out rank 0")


def check_mixing(subject: AlgorithmSubject) -> None:
    """``after_step`` changes the parameters exactly if ``mixes_parameters``, and never the statistics."""

    def work(rank: Rank) -> tuple[bool, bool]:
        parameters, statistics = rank.parameters(), rank.statistics()
        rank.run(2 * subject.size + 1, is_still=True)
        rank.hooks.outer_average.wait_in_flight()
        return (
            all(_is_same(a, b) for a, b in zip(rank.parameters(), parameters, strict=True)),
            all(_is_same(a, b) for a, b in zip(rank.statistics(), statistics, strict=True)),
        )

    results = subject.run(work)
    has_changed = not all(is_same for is_same, _ in results)
    if not subject.base.mixes_parameters:
        subject.expect(not has_changed, "mixes_parameters is False, but steps changed the parameters")
    elif subject.size > 1:
        subject.expect(has_changed, "mixes_parameters is True, but steps left all parameters as they were")
    subject.expect(
        all(is_same for _, is_same in results),
        "after_step must not change the statistics, which lie behind the parameters: use FlatBuffer.parameters",
    )


def check_single_rank(subject: AlgorithmSubject) -> None:
    """In a world of one rank, steps are those of the base optimizer, bit by bit."""
    if subject.size > 1:
        return

    def work(rank: Rank) -> bool:
        rank.fill_gradients()
        gradients = [buffer.array.copy() for buffer in rank.gradients]
        if rank.base.averages_gradients:
            rank.hooks.steps.average_gradients()
        is_same = all(_is_same(b.array, a) for b, a in zip(rank.gradients, gradients, strict=True))
        parameters = rank.parameters()
        rank.hooks.steps.after_step()
        return is_same and all(_is_same(a, b) for a, b in zip(rank.parameters(), parameters, strict=True))

    subject.expect(all(subject.run(work)), "without other ranks, gradients and parameters must stay bit-identical")


def _expect_mean(subject: AlgorithmSubject, own: list[Arrays], found: list[Arrays], name: str) -> None:
    for number, array in enumerate(found[0]):
        for rank, arrays in enumerate(found):
            subject.expect(
                _is_same(arrays[number], array),
                f"after {name}, ranks 0 and {rank} have different bits in {array.dtype}",
            )
        expected = np.mean([arrays[number].astype(np.float64) for arrays in own], axis=0)
        subject.expect(
            is_near(array, expected, array.dtype),
            f"after {name}, expected the mean {expected[:3]}, found {array[:3].astype(np.float64)} in {array.dtype}",
        )


def _is_same(one: Array, other: Array) -> bool:
    return one.tobytes() == other.tobytes()
