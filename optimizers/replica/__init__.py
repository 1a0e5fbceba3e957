"""The replica: counts inner steps and runs base algorithm, period and outer step in order, for every framework.

Of its parts each holds one idea, and is given what it works with.
"""

from lentando.optimizers.replica.replica import BaseState, Replica

__all__ = ["BaseState", "Replica"]
