"""The seam for outer rules: how an outer step moves from the anchor through the average of the replicas."""

from typing import Protocol

from lentando.comm.transport import Array

__all__ = ["OuterRule"]


class OuterRule(Protocol):
    """Describes an outer rule. It is a frozen dataclass, so that ranks and checkpoints can compare its settings.

    A rule works element by element: the outer step applies it to the shard of each rank, block by block, and sends
    nothing for it.
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
            anchor: the parameters at the start of the round; becomes those at the start of the next one. float32 or
                float64, one-dimensional.
            slow_buffer: the rule's momentum, like ``anchor``, zero at first; None unless ``keeps_momentum``.
            mean: the average at the end of the round, like ``anchor``; may be overwritten.
            learning_rate: the mean of the inner learning rates over the round; NaN if the base optimizer has none,
                which happens only where ``needs_learning_rate`` is false.
            scratch: memory like ``anchor``, or longer, that saves an allocation.
        """
