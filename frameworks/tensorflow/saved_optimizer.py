"""What Keras saves of a distributed optimizer: the base optimizer, so that the model can be loaded without a job."""

from typing import Any

import keras

from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.forwarding import ForwardsSettings

__all__ = ["SavesBaseOptimizer"]


class SavesBaseOptimizer(ForwardsSettings, keras.optimizers.Optimizer):  # type: ignore[misc]
    """Base class of the distributed optimizer with the methods that Keras calls to save and load an optimizer."""

    _base: BaseOptimizer
    _iterations: Any

    def save_own_variables(self, store: Any) -> None:
        """Save the base optimizer's variables for ``model.save``, with the count of all steps in place of its own."""
        for number, variable in enumerate(self.variables):
            is_count = variable is self._base.own_iterations
            store[str(number)] = (self._iterations if is_count else variable).numpy()

    def load_own_variables(self, store: Any) -> None:
        """Load the base optimizer's variables for ``model.load_weights``."""
        super().load_own_variables(store)
        self._iterations.assign(self._base.own_iterations)

    def set_weights(self, weights: Any) -> None:
        """Set the values of ``variables``, given in the same order.

        Raises:
            ConfigurationError: if there are more or fewer values, or one has another shape. Nothing is changed then.
        """
        super().set_weights(weights)
        self._iterations.assign(self._base.own_iterations)

    def get_config(self) -> dict[str, Any]:
        """The configuration of the base optimizer: a saved model does not depend on the job that trained it."""
        return {"optimizer": keras.optimizers.serialize(self._base.optimizer)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """The base optimizer of a saved model, to be wrapped again and compiled into the model for further training."""
        return keras.optimizers.deserialize(config["optimizer"], custom_objects)
