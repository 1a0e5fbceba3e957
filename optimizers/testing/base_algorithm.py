"""What every base algorithm must pass before a replica can rely on it: the promises of ``BaseAlgorithm``."""

from collections.abc import Callable, Sequence

from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.testing.algorithm_averages import (
    check_abort,
    check_consensus,
    check_mean,
    check_outer_average,
    check_rebase,
)
from lentando.optimizers.testing.algorithm_ranks import AlgorithmSubject
from lentando.optimizers.testing.algorithm_state import check_drop, check_recovery, check_resizing, check_state
from lentando.optimizers.testing.algorithm_steps import (
    check_binding,
    check_communication,
    check_description,
    check_gradient_average,
    check_mixing,
    check_partial_gradient_average,
    check_single_rank,
)

__all__ = ["check_base_algorithm"]


def check_base_algorithm(
    make_base: Callable[[], BaseAlgorithm], sizes: Sequence[int] = (1, 2, 3, 5), *, timeout_seconds: float = 20.0
) -> None:
    """Check that a base algorithm keeps every promise of ``lentando.optimizers.rules.base_algorithm``.

    The algorithm is driven on ranks that are threads of this process, over a small model of three dtypes. It takes a
    few seconds. Optional protocols are checked if the algorithm implements them. Messages of one step have always
    arrived before the next step, so that an algorithm whose results depend on the speed of the network can be checked
    for bit-identical resumption, too.

    Args:
        make_base: function without arguments that makes the description, such as the class itself.
        sizes: world sizes to run with.
        timeout_seconds: seconds after which ranks that wait for each other are given up.

    Raises:
        AssertionError: with the algorithm, the number of ranks, the broken promise and what was found.

    Example:
        >>> from lentando.optimizers.rules.gossip import SGP
        >>> check_base_algorithm(SGP, sizes=(1, 3))
    """
    for check in (
        check_description,
        check_binding,
        check_communication,
        check_gradient_average,
        check_partial_gradient_average,
        check_mixing,
        check_single_rank,
        check_mean,
        check_consensus,
        check_outer_average,
        check_abort,
        check_rebase,
        check_state,
        check_drop,
        check_recovery,
        check_resizing,
    ):
        for size in sizes:
            check(AlgorithmSubject(make_base, size, timeout_seconds))
