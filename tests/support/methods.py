"""Every method, as settings of the four choices, for tests that hold for each."""

from typing import Any

from lentando.optimizers.rules.adacomm import AdaptivePeriod
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.period import PostLocal
from lentando.optimizers.rules.slow_momentum import SlowMomentum

ROUND = 3
"""Inner steps between outer steps, where that is a number."""


def methods() -> dict[str, dict[str, Any]]:
    """Settings for ``DistributedOptimizer``, by name. What overlaps is deterministic, so that runs can be compared."""
    slow: dict[str, Any] = {"outer": SlowMomentum(1.0, 0.6), "period": ROUND}
    adaptive = AdaptivePeriod(ROUND, interval_steps=2, min_period=2)
    return {
        "allreduce": {},
        "local sgd": {"base": LocalSGD(), "period": PostLocal(2, ROUND)},
        "sgp": {"base": SGP()},
        "osgp": {"base": OSGP(staleness=2, deterministic=True)},
        "dpsgd": {"base": DPSGD()},
        "slowmo": {"base": LocalSGD(), "base_buffers": "reset", **slow},
        "bmuf": {"base": LocalSGD(), "base_buffers": "maintain", **slow},
        "lookahead": {"base": LocalSGD(), "outer": SlowMomentum(0.5, 0.0), "period": ROUND},
        "diloco": {"base": LocalSGD(), "outer": OuterSGD(0.7, 0.9, nesterov=True), "period": ROUND},
        "slowmo over allreduce": {"base": AllReduce(), **slow},
        "slowmo over sgp": {"base": SGP(), **slow},
        "slowmo over osgp": {"base": OSGP(staleness=1, deterministic=True), "base_buffers": "average", **slow},
        "slowmo over dpsgd": {"base": DPSGD(), **slow},
        "slowmo without average": {"base": SGP(), "exact_average": False, **slow},
        "slowmo alone without average": {"base": LocalSGD(), "exact_average": False, **slow},
        "slowmo with delay": {"base": LocalSGD(), "base_buffers": "reset", "delay": 2, **slow},
        "diloco in fragments": {
            "base": LocalSGD(),
            "outer": OuterSGD(0.7, 0.9, nesterov=True),
            "period": ROUND,
            "delay": 1,
            "fragments": 2,
            "blend": 0.25,
        },
        "adacomm": {"base": LocalSGD(), "period": adaptive},
        "adacomm over osgp": {"base": OSGP(deterministic=True), "period": adaptive, "outer": SlowMomentum(1.0, 0.3)},
    }
