"""A check of a replica's parameters when it is dropped or its job ends, after steps without communication.

Values that are not finite are normally found when ranks communicate. Without this check, training that ends in the
middle of a round could leave a model of NaN without any message.
"""

import logging
from collections.abc import Sequence

from lentando.comm.final_checks import check_before_leaving
from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Transport
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.rules.non_finite import NonFinite, first_non_finite

__all__ = ["LastLook"]

_log = logging.getLogger("lentando")


class LastLook:
    """Checks the flat buffers, if they are the memory of the model's parameters.

    Otherwise (in TensorFlow, and on GPUs that share no memory with the transport) the buffers hold what was last
    communicated, so that nothing is found. Holds no reference to the model.

    Args:
        transport: transport that connects the ranks that train together.
        progress: progress of the replica.
        non_finite: policy for values that are not finite.
        buffers: flat buffers of the replica.

    Attributes:
        buffers: as given; replaced when parameters are laid out again.
    """

    def __init__(
        self, transport: Transport, progress: Progress, non_finite: NonFinite, buffers: Sequence[FlatBuffer]
    ) -> None:
        self.buffers = buffers
        self._rank = transport.rank
        self._progress = progress
        self._non_finite = non_finite

    def begin(self, transport: Transport, owner: object) -> None:
        """Check the parameters when ``owner`` is dropped, or when this rank leaves the job."""
        check_before_leaving(transport, owner, self._look)

    def _look(self) -> str | None:
        progress = self._progress
        if progress.steps == 0 or self._non_finite.was_reported:
            return None
        name = first_non_finite(self.buffers, statistics=False)
        if name is None:
            return None
        found = f"parameter {name!r} is not finite at the end of training, after inner step {progress.inner_steps}"
        if self._non_finite.skips:
            _log.warning("rank %d: %s", self._rank, found)
            return None
        return found
