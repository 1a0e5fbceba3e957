"""Values that are not finite: named on every rank before anything is averaged, and left out if the user asked for it.

A rank looks at its own values before the ranks communicate anyway, and the control message tells all of them who has
found something; only then is more said. Looking costs one pass over memory. With "raise", outer steps
save it: the average that they have formed tells as well, only later (``lentando.optimizers.rules.outer_step``).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from typing import Literal, TypeAlias

from lentando.comm.errors import NonFiniteError, grouped_by_rank
from lentando.comm.flat import FlatBuffer, all_finite
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.constant_statistics import Constants
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["ADVICE", "NonFinite", "OnNonFinite", "Verdict", "first_non_finite", "loss_to_send"]

_log = logging.getLogger("lentando")

OnNonFinite: TypeAlias = Literal["raise", "skip"]

ADVICE = "Training has diverged there: lower the learning rate, clip gradients, or shorten the period"
"""What every error about it ends with."""


def first_non_finite(
    buffers: Sequence[FlatBuffer], statistics: bool = True, constants: Constants | None = None
) -> str | None:
    """Name of the first entry with a NaN or an infinity, or None.

    Args:
        buffers: the flat buffers to search.
        statistics: whether to search behind the parameters too.
        constants: statistics that may hold such values.
    """
    if constants is not None:
        entry = constants.first_non_finite(buffers)
        return None if entry is None else entry.name
    for buffer in buffers:
        if not all_finite(buffer.array if statistics else buffer.parameters):
            return buffer.first_non_finite()
    return None


def loss_to_send(loss: float | None) -> float:
    """Return a loss as a control message carries it: NaN stands for no loss, and infinity for a loss that is NaN."""
    return nan if loss is None else inf if isnan(loss) else loss


@dataclass(frozen=True)
class Verdict:
    """What all ranks know alike when some have values that are not finite.

    Attributes:
        partial_average: how this rank takes part in the average; None if every rank's values count.
        loss: mean of the losses that are finite, NaN if none is.
    """

    partial_average: PartialAverage | None
    loss: float


class NonFinite:
    """What this rank does about values that are not finite.

    Args:
        transport: ranks that train together.
        policy: whether they are an error, or are left out.

    Attributes:
        left_out: how often this rank's values were left out.
        was_reported: whether an error has said that values are not finite.
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
        """The error that says so, to be raised."""
        self.was_reported = True
        return NonFiniteError(text)

    def drop_non_finite(self, found: str) -> None:
        """This rank's parameters have left gossip, and come back with its neighbours' shares."""
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
        doing: str,
        found: str | None = None,
        is_active: bool = True,
        gossips: bool = False,
        is_lasting: bool = False,
        look: Callable[[], str | None] = lambda: None,
    ) -> Verdict | None:
        """Decide what is left out; None if all ranks' values are finite. Collective, after a control message.

        Args:
            by_rank: numbers of all ranks from the message: ``is_finite``, and ``loss`` if they have losses.
            doing: what is about to be averaged, in words.
            found: this rank's first values that are not finite, in words.
            is_active: whether this rank's numbers would count.
            gossips: see ``PartialAverage``.
            is_lasting: nothing that follows would make this rank's values finite again.
            look: names what was not looked at, for the error.

        Raises:
            NonFiniteError: on every rank, naming ranks and values, unless they may be left out and others remain.
        """
        losses: list[float] = by_rank["loss"].tolist() if "loss" in by_rank else []
        with_bad_loss = [rank for rank, loss in enumerate(losses) if not isnan(loss) and not isfinite(loss)]
        if by_rank["is_finite"].all() and not with_bad_loss:
            return None
        rank = self._transport.rank
        restored, self._restored = self._restored, None
        own = [f"{found} is not finite"] if found else []
        if not self.skips and (name := look()) is not None:
            own = [f"{name!r} is not finite"]
        own += [f"{restored!r} was not finite, and was restored by gossip"] if restored and not found else []
        own += ["its loss is not finite"] if rank in with_bad_loss else []
        told = allgather_object(
            self._transport, [", ".join(own) or "all is finite", found is None, is_active, is_lasting]
        )
        said = grouped_by_rank([text for text, *_ in told])
        finite = [is_finite for _, is_finite, _, _ in told]
        active = [is_finite and counts for _, is_finite, counts, _ in told]
        if not self.skips:
            raise self.error(f"{doing}: not all values are finite, so nothing was averaged. {said}. {ADVICE}")
        if not any(active):
            raise self.error(f"{doing}: no rank has finite values that could be averaged. {said}. {ADVICE}")
        if any(lasts for *_, lasts in told):
            raise self.error(
                f"{doing}: on_nonfinite='skip' cannot restore parameters where only gradients are averaged. {said}. "
                "Give a period, so that outer steps restore them"
            )
        self.left_out += found is not None
        if rank == 0 or own:
            _log.warning("%s: what is not finite was left out. %s", doing, said)
        losses = [loss for loss in losses if isfinite(loss)]
        partial_average = None
        if not all(finite):
            partial_average = PartialAverage(
                is_active, sum(active), sum(finite), gossips, found is None, is_over_debiased=True
            )
        return Verdict(partial_average, sum(losses) / len(losses) if losses else nan)
