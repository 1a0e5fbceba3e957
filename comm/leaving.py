"""The agreement of all ranks that they leave a job, or a subset of its ranks, together."""

from collections.abc import Sequence

from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.begun_work import complete_begun_work, count_begun_work
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import NonFiniteError, grouped_by_rank
from lentando.comm.notices import exchanges_begun
from lentando.comm.numbering import numbers_of
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport

__all__ = ["agree_to_leave"]


def agree_to_leave(leaving: Transport, problems: Sequence[str]) -> None:
    """Agree that all ranks leave after equally many gossip steps: others would never be received. Collective.

    Work in the background that not all ranks have begun is completed.

    Args:
        leaving: transport of the ranks.
        problems: results of this rank's final checks.

    Raises:
        MismatchError: on every rank, if one of them is about to do something else.
        NonFiniteError: on every rank, if one of them has problems.
    """
    steps = 0 if is_elastic(leaving) else exchanges_begun(leaving)  # an elastic rank that is behind skips some

    def description() -> str:
        return "has ended (shutdown, or the end of the program)" + (f" after {steps} gossip steps" if steps else "")

    numbers = {"has_problems": bool(problems), "begun": count_begun_work(leaving)}
    by_rank = agree(leaving, Intent(Event.SHUTDOWN, step=steps), description, numbers)
    if by_rank["has_problems"].any():
        found = grouped_by_rank(allgather_object(leaving, "; ".join(problems) or "all is finite"), numbers_of(leaving))
        raise NonFiniteError(
            f"the job ends with models that are not finite. {found}. Training has diverged there "
            "after its last outer step: lower the learning rate, clip gradients, or shorten the period"
        )
    if by_rank["begun"].any():
        complete_begun_work(leaving)
