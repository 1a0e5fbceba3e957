"""The distributed optimizer of the toy framework."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lentando.toy.library import SGD
from lentando.toy.model import ToyModel

from lentando.comm.transport import Array
from lentando.comm.world import transport
from lentando.optimizers.checkpoint.replica_training import ReplicaTraining
from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.methods import SettingsArguments
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica_optimizer import ReplicaOptimizer, check_not_wrapped
from lentando.optimizers.rules.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DistributedOptimizer"]


@takes_arguments_of(Settings, SettingsArguments)
class DistributedOptimizer(ReplicaOptimizer):
    """An optimizer of arrays whose model is one of the job's replicas.

    Args:
        optimizer: the base optimizer, which takes the inner steps.
        **settings: keyword arguments of ``lentando.optimizers.Settings``.

    Example:
        >>> import numpy as np, lentando.toy as lt
        >>> lt.init()
        >>> sgd = lt.SGD({"w": np.zeros(2)}, lr=0.1)
        >>> optimizer = lt.DistributedOptimizer(sgd, base=lt.SGP())
        >>> optimizer.step({"w": np.ones(2)}, loss=1.0)
        >>> optimizer.report()["inner_steps"]
        1
        >>> lt.shutdown()
    """

    def __init__(self, optimizer: SGD, **settings: "Unpack[SettingsArguments]") -> None:
        check_not_wrapped(optimizer)
        self._settings = Settings(**settings)
        self._model = ToyModel(optimizer)
        self._replica = Replica(transport(), self._model, self._settings)

    def step(self, gradients: dict[str, Array | None], *, loss: float | None = None) -> None:
        """Take one inner step, and the outer step if it is due."""
        if self._replica.averages_gradients:
            self._model.flat_gradients.put(gradients)
            self._replica.average_gradients(loss)
            gradients = self._model.flat_gradients.taken()
        self._replica.before_step()
        self._model.optimizer.step(gradients)
        if loss is not None:
            self._replica.record_loss(loss)
        self._replica.after_step()

    def training(self) -> ReplicaTraining:
        """The state in the form that checkpoints save and load."""
        return ReplicaTraining(self._replica, self._model.optimizer)

    def _ready_replica(self) -> Replica:
        return self._replica

    def _describe_base(self) -> str:
        return f"SGD(lr={self._model.optimizer.lr})"

    def _step_along(self, rates: Sequence[float], overflow: bool) -> bool:
        (self._model.optimizer.lr,) = rates
        self._model.optimizer.step(self._model.flat_gradients.taken())
        return True
