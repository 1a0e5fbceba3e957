"""What the parts of a replica work with that communicate while it trains."""

from dataclasses import dataclass

from lentando.optimizers.replica.costs import Costs
from lentando.optimizers.replica.messages import Messages
from lentando.optimizers.replica.plan import Plan
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.uneven import Uneven
from lentando.optimizers.rules.non_finite import NonFinite

__all__ = ["Part"]


@dataclass
class Part:
    """One of them.

    Args:
        plan: what the replica is made of.
        progress: how far it is.
        messages: precede what is sent.
        costs: are counted.
        non_finite: what is done about values that are not finite.
        uneven: what is done about ranks without a batch.
    """

    plan: Plan
    progress: Progress
    messages: Messages
    costs: Costs
    non_finite: NonFinite
    uneven: Uneven
