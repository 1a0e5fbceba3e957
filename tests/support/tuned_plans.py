"""The plans that the ranks of a transport have chosen so far by measurement."""

from lentando.comm.job import job_of
from lentando.comm.reductions.tuning import TunedPlan, Tuning
from lentando.comm.transport import Transport


def tuned_plans(transport: Transport) -> list[TunedPlan]:
    """All decisions, oldest first."""
    tuning = job_of(transport).find(Tuning)
    return [] if tuning is None else list(tuning.plans.values())
