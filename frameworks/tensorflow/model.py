"""The framework adapter for a Keras model and its optimizer: flat buffers, learning rates, optimizer state."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakSet

import keras
import numpy as np
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.transport import Array
from lentando.optimizers.canonical import canonical_tensors
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule
from lentando.optimizers.fixed_state import FixedState
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.rules.gradient_layout import gradient_layouts
from lentando.optimizers.weight_watch import WeightWatch
from lentando.tensorflow.assignments import Assignments
from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.convert import as_array, as_tensor
from lentando.tensorflow.description import describe_optimizer
from lentando.tensorflow.fixed_state import adapted_layers, finalize, fixed_state
from lentando.tensorflow.flat_gradients import KerasGradients
from lentando.tensorflow.names import layers_of, names_of
from lentando.tensorflow.state_variables import native

__all__ = ["KerasModel"]

_wrapped: "WeakSet[KerasModel]" = WeakSet()
"""The adapters of all wrapped optimizers of this process: several may train parts of one model."""


class KerasModel:
    """Implements ``lentando.optimizers.framework.CoveringFramework`` for Keras on TensorFlow.

    The variables keep their memory. Their values are copied into the flat buffers before each communication and back
    afterwards, once, without conversion. The flat buffers are in host memory even if the variables are on a GPU and the
    transport takes device arrays: TensorFlow does not expose its stream, so that it cannot be known when memory lent to
    it by another library is free again, and it reserves all memory of the GPU by default.

    Args:
        optimizer: the base optimizer.
        variables: variables that the optimizer trains.
        model: the model, whose floating-point statistics (of BatchNorm) are averaged with the variables. Variables of
            the model that this optimizer does not train are not averaged.
        mapping: map from the names and axes that all ranks use to those of this model, if they are another framework's.
        shares_memory: whether ranks on the same node should be able to read the flat buffers.
        steps: function that returns the number of steps that the optimizer has taken.

    Attributes:
        is_in_graph: whether a graph of the model is running, which keeps the constants that it was traced with.
    """

    name = "tensorflow"

    def __init__(
        self,
        optimizer: BaseOptimizer,
        variables: Sequence[Any],
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        shares_memory: bool = False,
        steps: Callable[[], int] = lambda: 0,
    ) -> None:
        self._shares_memory = shares_memory
        self._optimizer = optimizer
        if not variables:
            raise ConfigurationError("the optimizer has no trainable variable, so that there is nothing to average")
        trained = {id(native(variable)) for variable in variables}
        if model is not None and not any(id(native(variable)) in trained for variable in model.weights):
            raise ConfigurationError(
                "the model passed as model= has none of the optimizer's variables: pass the model that this optimizer "
                "trains, or no model"
            )
        self._trained = trained
        others = [] if model is None else [v for v in model.weights if id(native(v)) not in trained]
        self.names = names_of([*variables, *others], model)[: len(variables)]
        by_name = dict(zip(names_of([*variables, *others], model), [*variables, *others], strict=True))
        self._model = model
        self._adapted = adapted_layers(model)
        frozen = _frozen(model) | {id(native(v)) for layer in self._adapted for v in layer.weights}
        entries = []
        self._rest = {}
        for number, (name, variable) in enumerate(by_name.items()):
            tensor = native(variable)
            is_statistic = tensor.dtype.is_floating and not variable.trainable and id(tensor) not in frozen
            if number >= len(variables) and not is_statistic:
                self._rest[name] = tensor
                continue
            if tensor.dtype.is_complex:  # and trained: other complex weights were skipped above
                raise ConfigurationError(
                    f"variable {name!r} is trained and has dtype {tensor.dtype.name}, which Keras optimizers do not "
                    "support: keep its real and imaginary parts as two variables, and combine them by tf.complex where "
                    "it is used"
                )
            group = 0 if number < len(variables) else None
            entries.append(Entry(name, tuple(tensor.shape), tensor.dtype.name, group))
        self._has_mapping = mapping is not None
        self._mapping = mapping or WeightMap(WeightRule(name, name) for name in by_name)
        self._places = {place.entry.name: place for place in canonical_tensors(self._mapping, entries)}
        layouts = build_layouts(place.entry for place in self._places.values())
        self.buffers: Sequence[FlatBuffer] = [FlatBuffer(layout, shared=shares_memory) for layout in layouts]
        self._own_names = [self._places[entry.name].own for layout in layouts for entry in layout.entries]
        self._views = [view for buffer in self.buffers for view in self._in_own_axes(buffer, buffer.layout.entries)]
        self.variables = [native(by_name[name]) for name in self._own_names]
        self._numbers = {id(variable): number for number, variable in enumerate(self.variables)}
        self._held: Sequence[Any] | None = None
        self.is_in_graph = False
        self.assignments = Assignments(variables, steps)
        self.watch: WeightWatch = self.assignments
        _wrapped.add(self)

    def left_out(self) -> Sequence[str]:
        if self._model is None:
            return []
        taken = set().union(*(adapter._trained for adapter in _wrapped))  # noqa: SLF001 - of this class
        variables = self._model.trainable_variables
        names = names_of(variables, self._model)
        return [name for name, variable in zip(names, variables, strict=True) if id(native(variable)) not in taken]

    @property
    def gradients(self) -> Sequence[FlatBuffer]:
        return self.flat_gradients.buffers

    @cached_property
    def flat_gradients(self) -> KerasGradients:
        """The flat buffers in which gradients are averaged."""
        layouts = gradient_layouts(buffer.layout for buffer in self.buffers)
        buffers = [FlatBuffer(layout, shared=self._shares_memory) for layout in layouts]
        views = {
            entry.name: self._places[entry.name].rule.permuted(view)
            for buffer in buffers
            for entry, view in zip(buffer.layout.entries[:-1], buffer.views, strict=False)
        }
        by_name = dict(zip(self._own_names, self.variables, strict=True))
        name_of = {place.own: name for name, place in self._places.items()}
        return KerasGradients(buffers, views, {name_of[name]: by_name[name].shape for name in self.names})

    def _in_own_axes(self, buffer: FlatBuffer, entries: Sequence[Entry]) -> list[Array]:
        """Views of the memory of entries, with axes in the order of this model."""
        views = zip(entries, buffer.views, strict=False)
        return [self._places[entry.name].rule.permuted(view) for entry, view in views]

    def not_averaged(self) -> Mapping[str, Array]:
        """All other weights of the model by name. The states of seed generators are not weights."""
        return {
            rule.source: rule.inverse.apply(as_array(self._rest[name].read_value()))
            for name, rule in self._mapping.rules.items()
            if name in self._rest
        }

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None:
        for name, rule in self._mapping.rules.items():
            if rule.source in tensors:
                self._rest[name].assign(as_tensor(rule.apply(tensors[rule.source])))
        if self._model is not None and not self.is_in_graph:
            finalize(self._model, self._adapted)

    def moments(self) -> Sequence[tuple[str, str]]:
        """Names of means and variances of adapted layers; none in a job with other frameworks, which have none."""
        if self._has_mapping:
            return []
        name_of = {id(tensor): name for name, tensor in self._rest.items()}
        pairs = [
            (id(native(layer.adapt_mean)), id(native(layer.adapt_variance))) for layer in _measuring(self._adapted)
        ]
        return [(name_of[mean], name_of[variance]) for mean, variance in pairs]

    def fixed_state(self) -> FixedState:
        """State of layers outside their weights; none in a job with other frameworks, which lack such layers."""
        return [] if self._has_mapping else fixed_state(self._model)

    def names_by_id(self) -> dict[int, str]:
        """The name of every ``tf.Variable``, by its ``id``."""
        named = [*zip(self._own_names, self.variables, strict=True), *self._rest.items()]
        return {id(variable): name for name, variable in named}

    # One variable at a time and not in a tf.function, which would deadlock inside a graph's call of Python where
    # TensorFlow has a single thread.

    def load(self) -> None:
        held = self._held
        for number, (view, variable) in enumerate(zip(self._views, self.variables, strict=True)):
            value = as_array(variable.read_value() if held is None else held[number])
            np.copyto(view, value.reshape(view.shape))

    def store(self) -> None:
        tensors = [as_tensor(view, v.shape) for view, v in zip(self._views, self.variables, strict=True)]
        if self._held is not None:
            self._held = tensors
            return
        for variable, tensor in zip(self.variables, tensors, strict=True):
            variable.assign(tensor)

    def with_values(self, values: Sequence[Any], function: Callable[[], None]) -> Sequence[Any]:
        """Call ``function`` with tensors in place of the variables' values; returns the new values of the variables."""
        self._held = values
        try:
            function()
            return self._held
        finally:
            self._held = None

    def learning_rates(self) -> Sequence[float]:
        return [float(tf.convert_to_tensor(self._optimizer.learning_rate))]

    def describe_optimizer(self) -> OptimizerDescription:
        return describe_optimizer(self._optimizer.optimizer)

    @property
    def is_scaled(self) -> bool:
        """Whether a ``LossScaleOptimizer`` checks the gradients for overflow."""
        return self._optimizer.is_scaled

    def optimizer_buffers(self) -> Mapping[str, Array]:
        return self._optimizer.buffers()

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        self._optimizer.store_buffers(averaged)

    def reset_optimizer(self) -> None:
        self._optimizer.reset(self._value)

    def _value(self, variable: Any) -> Any:
        return variable.read_value() if self._held is None else self._held[self._numbers[id(variable)]]


def _measuring(layers: Sequence[Any]) -> list[Any]:
    """The layers that hold a mean and a variance of data."""
    return [layer for layer in layers if hasattr(layer, "adapt_mean") and hasattr(layer, "adapt_variance")]


def _frozen(model: keras.Model | None) -> set[int]:
    """The weights of frozen layers, whose statistics do not change either, by ``id``."""
    layers = [] if model is None else [layer for layer in layers_of(model) if not layer.trainable]
    return {id(native(variable)) for layer in layers for variable in layer.weights}
