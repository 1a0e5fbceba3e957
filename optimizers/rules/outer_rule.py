"""The protocol of outer rules: how an outer step moves from the anchor through the average of the replicas."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from lentando.comm.checks import check_flag, is_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Range, blocks
from lentando.comm.transport import Array

__all__ = ["OuterRule", "blocks_by_group", "check_outer_arguments"]


class OuterRule(Protocol):
    """An outer rule. It is a frozen dataclass, so that ranks and checkpoints can compare its settings.

    A rule works element by element: the outer step applies it to the shard of each rank, block by block, without
    communication.
    """

    @property
    def keeps_momentum(self) -> bool:
        """Whether ``step`` needs a momentum buffer of the size of the parameters."""

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the result of ``step`` depends on the learning rate."""

    def step(
        self,
        anchor: Array,
        slow_buffer: Array | None,
        mean: Array,
        learning_rate: float,
        scratch: Array | None = None,
    ) -> None:
        """Take one outer step in place.

        Args:
            anchor: parameters at the start of the round, a one-dimensional array of float32 or float64; becomes those
                at the start of the next round.
            slow_buffer: momentum of the rule, an array like ``anchor``, zero at first; None unless ``keeps_momentum``.
            mean: average at the end of the round, an array like ``anchor``; may be overwritten.
            learning_rate: mean of the inner learning rates over the round; NaN if the base optimizer has none, which
                happens only where ``needs_learning_rate`` is False.
            scratch: memory of the dtype of ``anchor``, at least as long, which saves an allocation; or None.
        """


def blocks_by_group(array: Array, ranges: Sequence[Range]) -> Iterator[tuple[slice, int | None]]:
    """Cut an array into elements that fit the cache and have one parameter group, each with the number of its group.

    Args:
        array: one-dimensional array.
        ranges: ranges of its elements, and their groups; None for statistics.
    """
    for part in ranges:
        for block in blocks(array[part.start : part.stop]):
            yield slice(part.start + block.start, min(part.start + block.stop, part.stop)), part.group


def check_outer_arguments(
    rate_name: str, rate: object, momentum_name: str, momentum: object, nesterov: object, instead: str
) -> None:
    """Check the arguments that outer rules have in common.

    Args:
        rate_name: name of the outer learning rate in messages.
        rate: outer learning rate.
        momentum_name: name of the momentum in messages.
        momentum: coefficient of the momentum.
        nesterov: whether the step is along the momentum of the next step.
        instead: end of the message for ``nesterov`` without momentum.

    Raises:
        ConfigurationError: if an argument is out of its range.
    """
    if not is_number(rate) or rate <= 0:  # type: ignore[operator]
        raise ConfigurationError(f"{rate_name} must be a number > 0, got {rate!r}")
    if not is_number(momentum) or not 0 <= momentum < 1:  # type: ignore[operator]
        raise ConfigurationError(f"{momentum_name} must be a number >= 0 and < 1, got {momentum!r}")
    check_flag("nesterov", nesterov)
    if nesterov and momentum == 0:
        raise ConfigurationError(f"nesterov=True needs {instead}")
