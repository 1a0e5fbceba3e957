"""The TensorFlow adapter passes the conformance suite for frameworks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import pytest

from lentando.comm.transport import Array
from lentando.optimizers.testing import check_framework
from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.convert import as_array, as_tensor
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.state_variables import native


class Subject:
    """Two dense layers of one or two dtypes with a BatchNormalization between them, and an integer counter."""

    def __init__(self, make_optimizer: Callable[[], Any], dtypes: Sequence[str]) -> None:
        layers = keras.layers
        keras.utils.set_random_seed(0)
        self.model = keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(4, dtype=dtypes[0]),
                layers.BatchNormalization(),
                layers.Dense(2, dtype=dtypes[1]),
                layers.Dropout(0.5),
            ]
        )
        iterations = keras.Variable(0, dtype="int64", trainable=False)
        self.optimizer = BaseOptimizer(make_optimizer(), resets=True, iterations=iterations)
        self.trained = self.model.trainable_variables
        self.framework = KerasModel(self.optimizer, self.trained, self.model, steps=lambda: int(iterations))
        self.optimizer.build(self.trained, self.framework.names)
        self.iterations = iterations
        self.gradients: list[Any] = []
        self.variables = {
            name: variable
            for name, tensor in zip(self.framework.names_by_id().values(), self.framework.variables, strict=False)
            for variable in self.model.weights
            if native(variable) is tensor
        }

    def read(self) -> Mapping[str, Array]:
        return {name: as_array(native(variable).read_value()).copy() for name, variable in self.variables.items()}

    def assign(self, values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            self.variables[name].assign(as_tensor(array))

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        (self.optimizer.learning_rate,) = rates

    def set_gradients(self, gradients: Mapping[str, Array]) -> None:
        self.gradients = [as_tensor(gradients[name]) for name in self.framework.names]

    def gather_gradients(self) -> None:
        self.framework.flat_gradients.gather([as_array(gradient) for gradient in self.gradients])

    def scatter_gradients(self) -> None:
        self.gradients = self.framework.flat_gradients.scatter(as_tensor)

    def step(self) -> None:
        self.optimizer.begin()
        with self.framework.assignments.paused():
            self.optimizer.optimizer.apply(self.gradients, self.trained)
        self.iterations.assign_add(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_optimizer", "dtypes"),
    [
        (lambda: keras.optimizers.SGD(0.125, momentum=0.5), ("float64", "bfloat16")),
        (lambda: keras.optimizers.Adam(0.125), ("float32", "float32")),
    ],
    ids=["SGD in float64 and bfloat16", "Adam"],
)
def test_the_adapter_keeps_the_promises_of_the_seam(make_optimizer: Callable[[], Any], dtypes: Sequence[str]) -> None:
    check_framework(lambda: Subject(make_optimizer, dtypes))
