"""The framework adapter: flat buffers, learning rates, optimizer state."""

from collections.abc import Mapping, Sequence

import numpy as np
from lentando.toy.library import SGD

from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.transport import Array
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.rules.gradient_layout import FlatGradients, gradient_layouts
from lentando.optimizers.weight_watch import NoWatch, WeightWatch


class ToyModel:
    """Implements ``lentando.optimizers.framework.Framework`` for arrays that are copied into the flat buffers."""

    name = "toy"

    def __init__(self, optimizer: SGD) -> None:
        self.optimizer = optimizer
        layouts = build_layouts(Entry(n, a.shape, a.dtype.name, 0) for n, a in optimizer.parameters.items())
        self.buffers: Sequence[FlatBuffer] = [FlatBuffer(layout) for layout in layouts]
        self.gradients: Sequence[FlatBuffer] = [FlatBuffer(layout) for layout in gradient_layouts(layouts)]
        self.flat_gradients = FlatGradients.over(self.gradients)
        self.watch: WeightWatch = NoWatch()
        self._views = {name: view for buffer in self.buffers for name, view in buffer.by_name.items()}

    def load(self) -> None:
        for name, view in self._views.items():
            view[...] = self.optimizer.parameters[name]

    def store(self) -> None:
        for name, view in self._views.items():
            self.optimizer.parameters[name] = view.copy()

    def not_averaged(self) -> Mapping[str, Array]:
        return {}

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None: ...

    def learning_rates(self) -> Sequence[float]:
        return [self.optimizer.lr]

    def describe_optimizer(self) -> OptimizerDescription:
        return OptimizerDescription("SGD", {"momentum": str(self.optimizer.momentum)}, {"lr": str(self.optimizer.lr)})

    def optimizer_buffers(self) -> Mapping[str, Array]:
        return {f"{name}.momentum": array for name, array in self.optimizer.momenta.items()}

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        self.optimizer.momenta = {name.removesuffix(".momentum"): array.copy() for name, array in averaged.items()}

    def reset_optimizer(self) -> None:
        self.optimizer.momenta = {name: np.zeros_like(array) for name, array in self.optimizer.momenta.items()}
