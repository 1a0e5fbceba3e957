"""Values that are not finite: they are reported on every rank before anything is averaged, or left out on request.

Each rank checks its own values before the ranks communicate. The control message contains the result, and only if a
rank has found such values do the ranks exchange which. The check costs one pass over memory. With "raise", outer steps
need no check: they find the values in the average that they have formed, and do not adopt it
(``lentando.optimizers.rules.outer_step``).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from typing import Any, Literal, TypeAlias

from lentando.comm.errors import NonFiniteError, grouped_by_rank
from lentando.comm.flat import FlatBuffer, all_finite
from lentando.comm.numbering import numbers_of
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = [
    "ADVICE",
    "NonFinite",
    "OnNonFinite",
    "Verdict",
    "error_of_average",
    "first_non_finite",
    "loss_to_send",
    "mean_loss",
]

_log = logging.getLogger("lentando")

OnNonFinite: TypeAlias = Literal["raise", "skip"]

ADVICE = "Training has diverged there: lower the learning rate, clip gradients, or shorten the period"
"""End of every message about values that are not finite."""


def first_non_finite(
    buffers: Sequence[FlatBuffer], statistics: bool = True, constants: Constants | None = None
) -> str | None:
    """Name of the first entry with a NaN or an infinity, or None.

    Args:
        buffers: flat buffers to search.
        statistics: whether to search the statistics behind the parameters, too.
        constants: statistics that may hold such values; None if there are none.
    """
    if constants is not None:
        entry = constants.first_non_finite(buffers)
        return None if entry is None else entry.name
    for buffer in buffers:
        if not all_finite(buffer.array if statistics else buffer.parameters):
            return buffer.first_non_finite()
    return None


def error_of_average(
    transport: Transport, constants: Constants, buffers: Sequence[FlatBuffer], *, is_exact: bool
) -> NonFiniteError:
    """Return the error for an average that is not finite, which the caller raises. Collective if it is over ranks.

    Args:
        transport: transport that connects the ranks.
        constants: statistics that may have values that are not finite.
        buffers: this rank's values.
        is_exact: whether the average is over ranks.

    Returns:
        The error, which names the first parameter on each rank.
    """
    entry = constants.first_non_finite(buffers)
    text = f"{entry.name!r} is not finite" if entry else "all parameters are finite"
    report: list[Any] = [text, entry is not None and entry.group is None]
    by_rank = allgather_object(transport, report) if is_exact else [report]
    first = grouped_by_rank([text for text, _ in by_rank], numbers_of(transport)) if is_exact else text
    hint = ". A buffer that is meant to hold such values must hold them when the optimizer is wrapped"
    return NonFiniteError(
        f"the average of the parameters is not finite, so it was not adopted. First offending parameter: {first}. "
        f"{ADVICE}{hint if any(is_statistic for _, is_statistic in by_rank) else ''}"
    )


def loss_to_send(loss: float | None) -> float:
    """A loss as a control message contains it: NaN stands for no loss, and infinity for a loss that is NaN."""
    return nan if loss is None else inf if isnan(loss) else loss


def mean_loss(losses: Array) -> float:
    """Return the mean of the ranks' losses, NaN if no rank has one.

    Args:
        losses: one per rank, as control messages contain them: NaN for a rank without a loss.
    """
    known = [float(loss) for loss in losses if not isnan(loss)]
    return sum(known) / len(known) if known else nan


@dataclass(frozen=True)
class Verdict:
    """What to average if some ranks have values that are not finite.

    Attributes:
        partial_average: how this rank takes part in the average; None if the values of all ranks count.
        loss: mean of the losses that are finite, equal on all ranks; NaN if none is.
    """

    partial_average: PartialAverage | None
    loss: float


class NonFinite:
    """The policy of one rank for values that are not finite.

    Args:
        transport: transport that connects the ranks.
        policy: "raise" to raise an error, "skip" to leave the values out.

    Attributes:
        skips: whether values are left out.
        left_out: number of times that this rank's values were left out.
        was_reported: whether an error about such values was raised.
    """

    def __init__(self, transport: Transport, policy: OnNonFinite) -> None:
        self._transport = transport
        self.skips = policy == "skip"
        self.left_out = 0
        self.was_reported = False
        self._restored: str | None = None

    def is_clean(self, found: str | None) -> bool:
        """Whether this rank has found only finite values, now and in gossip since the last message that was judged.

        Sent as ``is_finite`` with the control messages that ``judge`` follows.

        Args:
            found: name of values of this rank that are not finite, None if there are none.
        """
        return found is None and self._restored is None

    def error(self, text: str) -> NonFiniteError:
        """Make the error for such values, which the caller raises."""
        self.was_reported = True
        return NonFiniteError(text)

    def drop_non_finite(self, found: str) -> None:
        """Note that this rank's parameters are not sent in gossip, and will be restored by its neighbours' shares.

        Args:
            found: name of the parameter that is not finite.
        """
        self.left_out += 1
        self._restored = found
        _log.warning(
            "rank %d: %r is not finite, and is not sent to its neighbours, whose shares restore the model",
            self._transport.rank,
            found,
        )

    def judge(
        self,
        by_rank: Mapping[str, Array],
        operation: str,
        found: str | None = None,
        consequence: str = "nothing was averaged",
        is_active: bool = True,
        is_mixed: bool = False,
        is_lasting: bool = False,
        look: Callable[[], str | None] = lambda: None,
    ) -> Verdict | None:
        """Decide whose values are left out of an average. Collective, after a control message.

        Args:
            by_rank: numbers of all ranks from the message: ``is_finite``, and ``loss`` if they have losses.
            operation: description of the average, for messages.
            found: description of this rank's first values that are not finite; None if there are none.
            consequence: what follows from values that are not finite, for the error message.
            is_active: whether this rank's numbers would count.
            is_mixed: whether the base algorithm mixes parameters, as in ``PartialAverage``.
            is_lasting: whether nothing that follows would make this rank's values finite again.
            look: function that searches what was not checked before, and returns the name of the first entry with
                values that are not finite; called for the error message.

        Returns:
            The decision, None if the values of all ranks are finite.

        Raises:
            NonFiniteError: on every rank, with ranks and values, unless they may be left out and others remain.
        """
        losses: list[float] = by_rank["loss"].tolist() if "loss" in by_rank else []
        with_bad_loss = [rank for rank, loss in enumerate(losses) if not isnan(loss) and not isfinite(loss)]
        if by_rank["is_finite"].all() and not with_bad_loss:
            return None
        rank = self._transport.rank
        restored, self._restored = self._restored, None
        defects = [f"{found} is not finite"] if found else []
        if not self.skips and (name := look()) is not None:
            defects = [f"{name!r} is not finite"]
        defects += [f"{restored!r} was not finite, and was restored by gossip"] if restored and not found else []
        defects += ["its loss is not finite"] if rank in with_bad_loss else []
        reports = allgather_object(
            self._transport, [", ".join(defects) or "all is finite", found is None, is_active, is_lasting]
        )
        listed = grouped_by_rank([text for text, *_ in reports], numbers_of(self._transport))
        finite = [is_finite for _, is_finite, _, _ in reports]
        active = [is_finite and counts for _, is_finite, counts, _ in reports]
        if not self.skips:
            raise self.error(f"{operation}: not all values are finite, so {consequence}. {listed}. {ADVICE}")
        if not any(active):
            raise self.error(f"{operation}: no rank has finite values that could be averaged. {listed}. {ADVICE}")
        if any(lasts for *_, lasts in reports):
            raise self.error(
                f"{operation}: on_nonfinite='skip' cannot restore parameters where only gradients are averaged. "
                f"{listed}. Give a period, so that outer steps restore them"
            )
        self.left_out += found is not None
        if rank == 0 or defects:
            _log.warning("%s: what is not finite was left out. %s", operation, listed)
        losses = [loss for loss in losses if isfinite(loss)]
        partial_average = None
        if not all(finite):
            partial_average = PartialAverage(
                is_active, sum(active), sum(finite), is_mixed, found is None, is_over_debiased=True
            )
        return Verdict(partial_average, sum(losses) / len(losses) if losses else nan)
