"""The steps of an optimizer that has been built, eagerly and in graphs: averages, base optimizer, replica."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Transport
from lentando.optimizers.loss_argument import as_number
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.period import needs_loss
from lentando.optimizers.rules.settings import Settings
from lentando.tensorflow.backward_passes import BackwardPasses
from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.convert import as_tensor
from lentando.tensorflow.counted_steps import CountedSteps, record_loss
from lentando.tensorflow.gradient_averages import GradientAverages, Pairs
from lentando.tensorflow.local_variables import LocalVariables
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.state_variables import native

__all__ = ["Steps"]


class Steps:
    """Takes inner steps, and reports them to the replica, which takes the outer steps.

    The constructor is collective: all ranks check that they train the same model, and take rank 0's weights. If the
    variables have no values yet, because they are created in a graph that is being traced, the first step does so.

    Args:
        transport: transport that connects the participating ranks.
        settings: the training method.
        model: the framework adapter.
        base: the base optimizer, which is built here.
        variables: the trained variables.
        local: those of them that this rank has for itself.
        passes: accumulation of several backward passes in a step; None if every pass is a step.
        iterations: variable that counts all steps.
        keras_model: the user's model; None if it is not known.

    Attributes:
        counted: counter of the steps that graphs take.
        replica: the replica; None until the variables have values.
    """

    def __init__(
        self,
        transport: Transport,
        settings: Settings,
        model: KerasModel,
        base: BaseOptimizer,
        variables: Sequence[Any],
        local: LocalVariables,
        passes: BackwardPasses | None,
        iterations: Any,
        keras_model: keras.Model | None,
    ) -> None:
        self._transport = transport
        self._settings = settings
        self._model = model
        self._base = base
        self._variables = variables
        self._shared = local.shared(variables)
        self._passes = passes
        self._iterations = iterations
        self._keras_model = keras_model
        self.replica: Replica | None = None
        if all(variable.is_initialized() for variable in model.variables):
            self._make_replica()
        names = iter(model.names)
        base.build(
            variables, [None if variable in local else next(names) for variable in variables]
        )  # after the replica, which may have changed the weights that it copies
        is_mixing, period = settings.base.mixes_parameters, settings.period
        self.counted = CountedSteps(
            self._started_replica,
            model,
            [*base.variables, native(iterations)],
            "always" if is_mixing else "never" if period is None else "sometimes",
        )
        self._averages = GradientAverages(self._started_replica, model, self.counted, self._shared, local)

    @property
    def accumulated(self) -> list[Any]:
        """The variables that hold the sums of backward passes; none if every pass is a step."""
        return [] if self._passes is None else self._passes.variables

    def check_variables(self, variables: Sequence[Any]) -> None:
        """Check that a step is given variables that the optimizer was built for.

        Args:
            variables: variables of the step, in any order.

        Raises:
            ConfigurationError: for other variables, or if some were frozen meanwhile.
        """
        unknown = [getattr(v, "path", v.name) for v in variables if not self._averages.knows(v)]
        if unknown:
            raise ConfigurationError(
                f"the optimizer was built without the variables {unknown}: make a new optimizer when the trainable "
                "variables change (freeze layers first, then wrap and compile)"
            )
        if self._settings.outer is not None and len(variables) < len(self._variables):
            given = {id(variable) for variable in variables}
            frozen = [v.path for v in self._variables if id(v) not in given and not v.trainable]
            if frozen:
                raise ConfigurationError(
                    f"{frozen} were frozen after the optimizer was built, and its slow momentum would continue to move "
                    "them: make a new optimizer when the trainable variables change"
                )

    def ready_replica(self) -> Replica:
        """The replica, after all steps have been reported to it."""
        self.counted.settle()
        return self._started_replica()

    def take(self, pairs: Pairs, loss: Any | None, samples: Any | None = None) -> None:
        """Take a step, or add it to the graph that is being traced. Of several backward passes, the last one does so.

        Args:
            pairs: pairs of gradient and variable.
            loss: training loss of the step; None if it is not known.
            samples: number of samples of the step; None if it is not known.

        Raises:
            ConfigurationError: in a graph, if the loss is needed and not given, or if XLA is to compile the graph.
        """

        def step(pairs: Pairs) -> None:
            if tf.executing_eagerly():
                self._take(pairs, loss, samples)
            else:
                self._trace(pairs, loss, samples)

        if self._passes is None:
            step(pairs)
        else:
            self._passes.add(pairs, step)

    def _take(self, pairs: Pairs, loss: Any | None, samples: Any | None) -> None:
        """Take an eager step, and report it to the replica."""
        replica = self.ready_replica()
        rates = self._model.learning_rates()  # before the step, which advances a schedule
        if loss is not None:
            loss = float(tf.reshape(loss, [])) if tf.is_tensor(loss) else as_number(loss)
        if replica.averages_gradients:
            pairs = self._averages.eager(pairs, loss)
        replica.before_step()
        before = int(self._base.updates)
        self._base_step(pairs)
        if loss is not None:
            record_loss(replica, self._model, loss)
        if int(self._base.updates) != before:
            if samples is not None:
                replica.rank_weights.record_samples(float(samples))
            replica.after_steps(1, rates)
            self.counted.refresh()
            replica.stopping.stop_if_agreed()

    def take_along(self, rates: Sequence[float]) -> bool:
        """Take a step along the averaged gradients of other ranks, when this rank has no batches left.

        Args:
            rates: learning rate of those ranks, as the only element.

        Returns:
            Whether this completes an inner step.
        """
        gradients = self._model.flat_gradients.scatter(as_tensor)
        own_rate, (rate,) = float(self._base.learning_rate), rates
        if rate != own_rate:
            self._base.learning_rate = rate
        before = int(self._base.updates)
        self._base_step(list(zip(gradients, self._shared, strict=True)))
        if rate != own_rate:
            self._base.learning_rate = own_rate
        return int(self._base.updates) != before

    def _trace(self, pairs: Pairs, loss: Any | None, samples: Any | None) -> None:
        """Add a step to the graph that is being traced."""
        period = self._settings.make_period()
        if loss is None and period is not None and needs_loss(period):
            raise ConfigurationError(
                f"{period!r} depends on the training loss, and this graph takes steps without it: call "
                "apply(gradients, variables, loss=loss), or scale_loss(loss) before"
            )
        if self._keras_model is not None and self._keras_model.compiled and self._keras_model.jit_compile:
            raise ConfigurationError(
                "XLA cannot compile a step that communicates: use model.compile(..., jit_compile=False)"
            )
        counted = self.counted
        counted.trace()
        rate = tf.convert_to_tensor(self._base.learning_rate)
        begun: Any = nullcontext()
        if self._settings.base.averages_gradients:
            pairs = self._averages.traced(pairs, loss)
        else:
            begun = tf.control_dependencies([counted.begin()])
        before = tf.identity(self._base.updates) if self._base.accumulation_steps else None
        with begun:
            self._base_step(pairs)
        counted.end(None if before is None else tf.not_equal(before, self._base.updates), rate, loss, samples)

    def _base_step(self, pairs: Pairs) -> None:
        with self._model.assignments.paused():
            self._base.optimizer.apply([gradient for gradient, _ in pairs], [variable for _, variable in pairs])
        self._iterations.assign_add(1)

    def _started_replica(self) -> Replica:
        """The replica, created if it does not exist. Before the first step, the base optimizer copies the weights."""
        replica = self.replica
        if replica is None:
            self._model.is_in_graph = True
            replica = self._make_replica()
            self._model.is_in_graph = False
        if not replica.inner_steps:
            self._base.begin()
        return replica

    def _make_replica(self) -> Replica:
        self.replica = Replica(self._transport, self._model, self._settings)
        return self.replica
