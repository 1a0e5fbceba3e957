"""A Keras model and its optimizer as the replica sees them: flat buffers, learning rates, optimizer state."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.transport import Array
from lentando.optimizers.gradients import gradient_layouts
from lentando.tensorflow.base_optimizer import BaseOptimizer, native
from lentando.tensorflow.convert import as_array, as_tensor
from lentando.tensorflow.names import layers_of, names_of

__all__ = ["KerasModel"]


class KerasModel:
    """Implements ``lentando.optimizers.framework.Framework`` for Keras on TensorFlow.

    The variables keep their memory: they are copied into the flat buffers before each communication and out of them
    after it, once, without conversion.

    Args:
        optimizer: the base optimizer.
        variables: that it trains.
        model: whose floating-point statistics (of BatchNorm) are averaged with them.
    """

    def __init__(self, optimizer: BaseOptimizer, variables: Sequence[Any], model: keras.Model | None = None) -> None:
        self._optimizer = optimizer
        if not variables:
            raise ConfigurationError("the optimizer has no trainable variable: nothing could be averaged")
        trained = {id(native(variable)) for variable in variables}
        others = [] if model is None else [v for v in model.weights if id(native(v)) not in trained]
        self.names = names_of([*variables, *others], model)[: len(variables)]
        by_name = dict(zip(names_of([*variables, *others], model), [*variables, *others], strict=True))
        frozen = _frozen(model)
        entries = []
        self._rest = {}
        for number, (name, variable) in enumerate(by_name.items()):
            tensor = native(variable)
            if number >= len(variables) and (not tensor.dtype.is_floating or id(tensor) in frozen):
                self._rest[name] = tensor
                continue
            group = 0 if number < len(variables) else None
            entries.append(Entry(name, tuple(tensor.shape), tensor.dtype.name, group))
        self.buffers: Sequence[FlatBuffer] = [FlatBuffer(layout) for layout in build_layouts(entries)]
        self._views = [view for buffer in self.buffers for view in buffer.views]
        self.variables = [native(by_name[entry.name]) for buffer in self.buffers for entry in buffer.layout.entries]
        optimizer.build(variables, self.names)
        self._held: Sequence[Any] | None = None

    @property
    def gradients(self) -> Sequence[FlatBuffer]:
        return self.flat_gradients.buffers

    @cached_property
    def flat_gradients(self) -> "_Gradients":
        """Where gradients are averaged."""
        return _Gradients(self.buffers, self.names)

    def not_averaged(self) -> dict[str, Any]:
        """The rest of the model's weights: frozen ones and integers. Seeds are no weights."""
        return self._rest

    def names_by_id(self) -> dict[int, str]:
        """What every ``tf.Variable`` is called, by its ``id``."""
        averaged = [entry.name for buffer in self.buffers for entry in buffer.layout.entries]
        named = [*zip(averaged, self.variables, strict=True), *self._rest.items()]
        return {id(variable): name for name, variable in named}

    # Variable by variable, not in a tf.function: within a graph's call of Python, that would wait for the thread that
    # waits for it, where TensorFlow has only one.

    def load(self) -> None:
        held = self._held
        for number, (view, variable) in enumerate(zip(self._views, self.variables, strict=True)):
            np.copyto(view, as_array(variable.read_value() if held is None else held[number]))

    def store(self) -> None:
        tensors = [as_tensor(view) for view in self._views]
        if self._held is not None:
            self._held = tensors
            return
        for variable, tensor in zip(self.variables, tensors, strict=True):
            variable.assign(tensor)

    def with_values(self, values: Sequence[Any], function: Callable[[], None]) -> Sequence[Any]:
        """Call ``function`` with these tensors in place of the variables' values; the values that they should have."""
        self._held = values
        try:
            function()
            return self._held
        finally:
            self._held = None

    def learning_rates(self) -> Sequence[float]:
        return [float(tf.convert_to_tensor(self._optimizer.learning_rate))]

    def optimizer_buffers(self) -> Mapping[str, Array]:
        return self._optimizer.buffers()

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        self._optimizer.store_buffers(averaged)

    def reset_optimizer(self) -> None:
        self._optimizer.reset()


class _Gradients:
    """Flat gradients, and for each variable whether it has one."""

    def __init__(self, buffers: Sequence[FlatBuffer], names: Sequence[str]) -> None:
        self.buffers = [FlatBuffer(layout) for layout in gradient_layouts(buffer.layout for buffer in buffers)]
        places = {}
        for buffer in self.buffers:
            *trained, presence = buffer.views
            for number, (entry, view) in enumerate(zip(buffer.layout.entries, trained, strict=False)):
                places[entry.name] = view, presence[number : number + 1]
        self._places = [places[name] for name in names]

    def gather(self, gradients: Sequence[Any | None]) -> None:
        """Copy a gradient for each variable in, as eager tensors."""
        for gradient, (view, present) in zip(gradients, self._places, strict=True):
            present[...] = gradient is not None
            np.copyto(view, 0 if gradient is None else as_array(gradient), casting="same_kind")

    def scatter(self) -> list[Any | None]:
        """The averaged gradients; None for a variable that had none on any rank."""
        return [as_tensor(view) if present[0] > 0 else None for view, present in self._places]


def _frozen(model: keras.Model | None) -> set[int]:
    """The weights of layers that are frozen: their statistics stand still too."""
    layers = [] if model is None else [layer for layer in layers_of(model) if not layer.trainable]
    return {id(native(variable)) for layer in layers for variable in layer.weights}
