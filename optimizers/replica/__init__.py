"""The replica: runs base optimizer, base algorithm, period and outer step in order, for every framework.

``replica.py`` holds the order of a step. Each of the other files holds one stage of it, or one policy.
"""

from lentando.optimizers.replica.between_steps import BaseState
from lentando.optimizers.replica.replica import Replica

__all__ = ["BaseState", "Replica"]
