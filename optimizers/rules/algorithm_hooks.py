"""Neutral defaults for the optional protocols of base algorithms: what a replica does where an algorithm lacks one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.rules.base_algorithm import (
    BoundAlgorithm,
    DropsNonFinite,
    OuterAverageHooks,
    Recoverable,
    Resizable,
    SearchesGradients,
    StatefulAlgorithm,
)
from lentando.optimizers.rules.gradient_buckets import BucketCoverage, OverlapsGradients
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["OPTIONAL_PROTOCOLS", "AlgorithmHooks", "hooks_of"]

OPTIONAL_PROTOCOLS: tuple[type, ...] = (
    OuterAverageHooks,
    StatefulAlgorithm,
    DropsNonFinite,
    Recoverable,
    Resizable,
    OverlapsGradients,
    SearchesGradients,
)


@dataclass(frozen=True)
class AlgorithmHooks:
    """A bound algorithm with an implementation of every optional protocol: its own, or the neutral default.

    Attributes:
        steps: the algorithm itself, with the hooks of each step.
        outer_average: hooks around exact averages.
        state: state besides the parameters.
        non_finite: keeps parameters that are not finite from other ranks.
        recovery: begins again after ranks have died.
        resizing: continues a saved state on another number of ranks.
        overlap: averages gradients during the backward pass.
        search: finds gradients that are not finite while it averages them.
    """

    steps: BoundAlgorithm
    outer_average: OuterAverageHooks
    state: StatefulAlgorithm
    non_finite: DropsNonFinite
    recovery: Recoverable
    resizing: Resizable
    overlap: OverlapsGradients
    search: SearchesGradients

    @property
    def has_state(self) -> bool:
        """Whether the algorithm has a state besides the parameters."""
        return not isinstance(self.state, _NoState)

    def prepare_average(self, partial_average: PartialAverage | None = None) -> None:
        """Make the buffers ready for an exact average.

        Args:
            partial_average: how this rank takes part in it; None for the average over all ranks.
        """
        if partial_average is not None and partial_average.is_over_debiased:
            self.outer_average.wait_in_flight()
        else:
            self.outer_average.prepare_average()


def hooks_of(bound: BoundAlgorithm) -> AlgorithmHooks:
    """All hooks of a bound algorithm.

    Raises:
        ConfigurationError: if the algorithm has some methods of an optional protocol, and lacks others.
    """
    for protocol in OPTIONAL_PROTOCOLS:
        members = [name for name in vars(protocol) if not name.startswith("_")]
        missing = [name for name in members if not hasattr(bound, name)]
        if missing and len(missing) < len(members):
            present = [name for name in members if name not in missing]
            raise ConfigurationError(
                f"{type(bound).__name__} has {', '.join(present)} of the protocol {protocol.__name__}, but not "
                f"{', '.join(missing)}: a base algorithm implements all of an optional protocol or nothing of it"
            )
    name = type(bound).__name__
    outer_average = bound if isinstance(bound, OuterAverageHooks) else _NothingInFlight()
    return AlgorithmHooks(
        bound,
        outer_average,
        bound if isinstance(bound, StatefulAlgorithm) else _NoState(),
        bound if isinstance(bound, DropsNonFinite) else _RefusesDrop(name),
        bound if isinstance(bound, Recoverable) else _BeginsAgain(outer_average),
        bound if isinstance(bound, Resizable) else _RefusesState(name),
        bound if isinstance(bound, OverlapsGradients) else _NoOverlap(),
        bound if isinstance(bound, SearchesGradients) else _NoSearch(),
    )


class _NothingInFlight:
    """The buffers are what is averaged, and nothing else depends on them."""

    def wait_in_flight(self) -> None:
        return

    def prepare_average(self) -> None:
        return

    def abort_average(self) -> None:
        return

    def adopt_consensus(self) -> None:
        return

    def rebase_on_model(self) -> None:
        return


class _NoState:
    """The model's parameters decide everything."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


class _RefusesDrop:
    """Mixing without the parameters of a rank would change the mean in an unknown way.

    Args:
        name: name of the bound algorithm's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def allow_drop(self) -> None:
        raise ConfigurationError(
            f"{self._name} does not define how replicas continue without the parameters of a rank that are not finite "
            "(allow_drop): use on_nonfinite='raise'"
        )

    def drop_non_finite(self) -> None:
        return


class _BeginsAgain:
    """No step of another rank depends on how many exchanges this rank has begun.

    Args:
        outer_average: hooks of the algorithm.
    """

    begun_exchanges = 0

    def __init__(self, outer_average: OuterAverageHooks) -> None:
        self._outer_average = outer_average

    def resume_after_failure(self, begun_exchanges: int, most_begun: int) -> None:
        self._outer_average.adopt_consensus()


class _RefusesState:
    """The parameters are what is averaged; a state belongs to the number of ranks that saved it.

    Args:
        name: name of the bound algorithm's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        return parameters

    def state_for_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> dict[str, Any]:
        if state:
            raise ConfigurationError(
                f"{self._name} does not define how it continues on another number of ranks (state_for_average): start "
                "as many ranks as saved the checkpoint"
            )
        return {}


class _NoOverlap:
    """Gradients are averaged at the step, after the whole backward pass."""

    buckets = None

    def finish_buckets(self, agreed: BucketCoverage) -> None:
        return


class _NoSearch:
    """Gradients are searched before they are averaged."""

    can_search = takes_parts = False

    def average_and_search(self, parts: Sequence[Sequence[Array]] | None = None) -> Sequence[str | None]:
        raise NotImplementedError
