"""Whether a replica's parameters are finite when it is dropped or its job ends, after steps without a message.

Values that are not finite are found when ranks communicate. A training that ends in the middle of a round would
otherwise leave a model of NaN without a word.
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
    """Looks at the flat buffers, which are the parameters' own memory where they travel from there.

    Elsewhere (in TensorFlow, and on GPUs that share no memory with the transport) the buffers hold what was last
    communicated, so that nothing is found. Holds no reference to the model.

    Args:
        transport: ranks that train together.
        progress: of the replica.
        non_finite: what is done about such values.
        buffers: the flat buffers.

    Attributes:
        buffers: as given; set anew when parameters are laid out again.
    """

    def __init__(
        self, transport: Transport, progress: Progress, non_finite: NonFinite, buffers: Sequence[FlatBuffer]
    ) -> None:
        self.buffers = buffers
        self._rank = transport.rank
        self._progress = progress
        self._non_finite = non_finite

    def begin(self, transport: Transport, owner: object) -> None:
        """Look when ``owner`` is dropped, or this rank leaves the job."""
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
