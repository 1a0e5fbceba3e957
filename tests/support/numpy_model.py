"""The smallest framework that a replica can drive: a vector trained by SGD with momentum, in NumPy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lentando.comm.array_module import copy_into, is_on_host, to_host
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.weight_watch import NoWatch, SampledWeights, WeightWatch


def in_shared_memory(array: Array) -> Array:
    """A copy that neighbours can reach, as frameworks have their flat buffers."""
    copy = shared_zeros(array.size, array.dtype)
    copy[:] = array
    return copy


class NumpyModel:
    """Implements ``Framework``. The vector is cut in two parameter groups, whose learning rates may differ.

    Args:
        start: initial parameters, one-dimensional.
        learning_rates: of the two groups.
        momentum: heavy-ball momentum.
        place: where its memory lies: host memory, ``in_shared_memory``, or ``device_arrays.asarray``.
    """

    name = "numpy"

    def __init__(
        self,
        start: Array,
        learning_rates: Sequence[float] = (0.1, 0.1),
        momentum: float = 0.0,
        place: Callable[[Array], Array] = np.asarray,
    ) -> None:
        half = start.size // 2
        entries = [Entry(f"part{g}", (n,), start.dtype.name, g) for g, n in enumerate((half, start.size - half))]
        (layout,) = build_layouts(entries)
        self.x, self.gradient, self.momentum_buffer = (place(np.zeros_like(start)) for _ in range(3))
        self.buffers: Sequence[FlatBuffer] = [FlatBuffer(layout, self.x)]
        self.gradients: Sequence[FlatBuffer] = [FlatBuffer(layout, self.gradient)]
        self.watch: WeightWatch = SampledWeights(self.buffers) if is_on_host(self.x) else NoWatch()
        copy_into(self.x, start)
        self.rates = list(learning_rates)
        self.momentum = momentum

    def load(self) -> None:
        """The flat buffer is the model."""

    def store(self) -> None:
        """The flat buffer is the model."""

    def not_averaged(self) -> Mapping[str, Array]:
        return {}

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None:
        assert not tensors

    def learning_rates(self) -> Sequence[float]:
        return self.rates

    def describe_optimizer(self) -> OptimizerDescription:
        return OptimizerDescription("numpy SGD", {"momentum": str(self.momentum)}, {})

    def optimizer_buffers(self) -> Mapping[str, Array]:
        return {"momentum": to_host(self.momentum_buffer)}

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        copy_into(self.momentum_buffer, averaged["momentum"])

    def reset_optimizer(self) -> None:
        self.momentum_buffer[:] = 0

    def step(self) -> None:
        """The base optimizer: SGD."""
        self.momentum_buffer[:] = self.momentum * self.momentum_buffer + self.gradient
        half = self.x.size // 2
        self.x[:half] -= self.rates[0] * self.momentum_buffer[:half]
        self.x[half:] -= self.rates[1] * self.momentum_buffer[half:]


class Worker:
    """A replica with its model and its share of the gradients.

    Args:
        transport: ranks that train together.
        gradient: see ``reference``.
        start: initial parameters.
        learning_rates: of each step, a number or one number per parameter group.
        momentum: of the base optimizer.
        loss: the training loss of a step, from the worker that takes it; None gives the replica no loss.
        place: see ``NumpyModel``.
        averages_loss: give the loss of a step also to an average of its gradients, as the frameworks' adapters do.
        settings: for ``Settings``.
    """

    def __init__(
        self,
        transport: Transport,
        gradient: Any,
        start: Array,
        learning_rates: Any,
        momentum: float = 0.0,
        loss: "Callable[[Worker], float] | None" = None,
        place: Callable[[Array], Array] = np.asarray,
        averages_loss: bool = False,
        **settings: Any,
    ) -> None:
        self.rank = transport.rank
        self.gradient = gradient
        self.learning_rates = learning_rates
        self.loss = loss
        self.averages_loss = averages_loss
        self.model = NumpyModel(start, momentum=momentum, place=place)
        self.replica = Replica(transport, self.model, Settings(**settings))

    def run(self, steps: int) -> Array:
        """Take steps; returns the parameters, live."""
        for _ in range(steps):
            step = self.replica.inner_steps
            self.model.rates = list(np.broadcast_to(self.learning_rates(step), 2))
            copy_into(self.model.gradient, self.gradient(self.rank, step, to_host(self.model.x)))
            loss = None if self.loss is None else self.loss(self)
            if self.replica.averages_gradients:
                self.replica.average_gradients(loss if self.averages_loss else None)
            self.replica.before_step()
            self.model.step()
            if loss is not None:
                self.replica.record_loss(loss)
            self.replica.after_step()
        return self.model.x

    def run_joined(self, steps: int) -> Array:
        """As ``run``, where other ranks may take more or fewer steps."""
        with self.replica.join(self._step_along):
            return self.run(steps)

    def _step_along(self, rates: Sequence[float], overflow: bool) -> bool:
        self.model.rates = list(rates)
        if not overflow:
            self.model.step()
        return True

    def run_counted(self, steps: int, at_once: int) -> Array:
        """As ``run`` with local steps, but reports to the replica only when it must, or after so many steps."""
        count, sums = 0, np.zeros(2)
        for step in range(steps):
            self.model.rates = list(np.broadcast_to(self.learning_rates(step), 2))
            self.model.gradient[:] = self.gradient(self.rank, step, self.model.x)
            if step == 0:
                self.replica.before_step()
            self.model.step()
            count, sums = count + 1, sums + self.model.rates
            if count in (self.replica.steps_until_due(), at_once) or step == steps - 1:
                self.replica.record_loss(float(count), count)
                self.replica.after_steps(count, sums.tolist())
                count, sums = 0, np.zeros(2)
        return self.model.x

    def slow_buffer(self) -> Array:
        """This rank's shard of the slow momentum."""
        buffer: Array = self.replica.state_dict()["outer"]["slow_buffers"]["flat"][0]
        return buffer
