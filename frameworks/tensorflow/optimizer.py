"""The optimizers that Keras users write: a wrapper round their own, which the replica drives."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from lentando.comm.capabilities import shares_memory
from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.world import transport
from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.face import ReplicaOptimizer
from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.loss import as_number
from lentando.optimizers.methods import SettingsArguments
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.state import copied
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.period import needs_loss
from lentando.optimizers.rules.settings import Settings
from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.checkpoint_state import KerasTraining
from lentando.tensorflow.counted_steps import CountedSteps, check_loss, record_loss
from lentando.tensorflow.description import describe_optimizer
from lentando.tensorflow.fixed_state import check_synchronized
from lentando.tensorflow.forwarding import ForwardsSettings
from lentando.tensorflow.gradient_averages import GradientAverages, Pairs
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.original_errors import convert_errors_of
from lentando.tensorflow.precision import warn_of_rounded_betas
from lentando.tensorflow.python_calls import check_can_wait, unconverted
from lentando.tensorflow.state_variables import native

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DistributedOptimizer"]


@keras.saving.register_keras_serializable("lentando")
@takes_arguments_of(Settings, SettingsArguments)
class DistributedOptimizer(ReplicaOptimizer, ForwardsSettings, keras.optimizers.Optimizer):  # type: ignore[misc]
    """A Keras optimizer whose model is one of the job's replicas.

    Wraps any Keras 3 optimizer and is one itself: in ``model.compile`` and ``fit``, in a ``tf.function`` and in an
    eager loop. Hyperparameters (``learning_rate``, ``momentum``, ``clipnorm``, ...) are those of the base optimizer,
    whether they are read or changed here or there, so that callbacks and schedules work. ``AllReduce`` averages the
    gradients before they are clipped.

    All ranks take the weights of rank 0: at construction if ``model`` is built, otherwise in the first step, whose
    gradients are then those of the rank's own weights. An inner step is one update of the weights: with
    ``gradient_accumulation_steps=k``, every k-th call of ``apply``. With ``on_nonfinite``, a ``LossScaleOptimizer``
    handles gradients that are not finite itself.

    Args:
        optimizer: the base optimizer, which takes the inner steps, or a name that ``keras.optimizers.get`` takes, such
            as ``"adam"``.
        model: the model. Its floating-point statistics (of BatchNorm) are averaged at outer steps, and its frozen and
            integer weights are taken from rank 0. None if the optimizer's variables are all that is trained.
        mapping: a ``WeightMap`` from the names and axes of a PyTorch model to those of this one, for a job whose other
            ranks run PyTorch.
        **settings: keyword arguments of ``lentando.optimizers.Settings``.

    Raises:
        NotInitializedError: before ``init()``.
        ConfigurationError: for settings that cannot work.
        MismatchError: on every rank, if models or settings differ between ranks.

    Example:
        >>> import keras, numpy as np, lentando.tensorflow as lt
        >>> lt.init()
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(lt.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, base=lt.SGP()), "mse")
        >>> history = model.fit(np.ones([8, 2]), np.ones([8, 1]), batch_size=4, verbose=0)
        >>> model.optimizer.report()["inner_steps"]
        2
        >>> lt.shutdown()
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[SettingsArguments]",
    ) -> None:
        world = transport()
        method = Settings(**settings)
        _check_surroundings()
        if isinstance(method.base, AllReduce) and method.base.overlap:
            raise ConfigurationError("AllReduce(overlap=True) is PyTorch's: leave overlap out")
        if isinstance(optimizer, str):
            optimizer = _named(optimizer)
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise ConfigurationError(
                f"expected a Keras 3 optimizer (keras.optimizers) to wrap, got {type(optimizer).__name__}"
            )
        if any(isinstance(o, DistributedOptimizer) for o in (optimizer, getattr(optimizer, "inner_optimizer", None))):
            raise ConfigurationError("this optimizer is a DistributedOptimizer already: wrap the base optimizer, once")
        super().__init__(learning_rate=0.0, name=f"distributed_{optimizer.name}")
        if mapping is not None and method.base_buffers == "average":
            raise ConfigurationError(
                "base_buffers='average' is not possible beside another framework (mapping=), whose optimizers keep "
                "other things: use 'reset' or 'maintain'"
            )
        self._world = world
        self._mapping = mapping
        self._settings = method
        does_reset = method.for_optimizer(describe_optimizer(optimizer)).base_buffers == "reset"
        self._base = BaseOptimizer(optimizer, does_reset or method.on_nonfinite == "skip", self._iterations)
        self._hidden = _Hidden(model)
        self._base_optimizer = optimizer
        self._model: KerasModel
        self._made: Replica | None = None
        self._counted: CountedSteps
        self._averages: GradientAverages
        self._scaled_loss: tuple[Any, Any] | None = None
        if model is not None:
            convert_errors_of(model)
        if model is not None and model.built and model.trainable_variables:
            self.build(model.trainable_variables)

    @property
    def base_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer that was wrapped."""
        return self._base_optimizer

    @property
    def learning_rate(self) -> Any:
        """The base optimizer's."""
        return self._base.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._base.learning_rate = value

    @property
    def iterations(self) -> Any:
        """Steps taken; as the base optimizer's, but goes on when an outer step makes that new."""
        steps = self._base.accumulation_steps
        return keras.ops.floor_divide(self._iterations, steps) if steps else self._iterations

    def build(self, variables: Iterable[Any]) -> None:
        """Make the replica: all ranks check that they train the same model, and take over rank 0's weights.

        Collective. Called by Keras, or by the first step.
        """
        if self.built:
            return
        # Not in the graph that is being traced, which would do it at every step.
        with nullcontext() if tf.executing_eagerly() else tf.init_scope():
            variables = list(variables)
            check_synchronized(self._hidden.model, self._world.size)
            shared = shares_memory(self._world)
            self._model = KerasModel(
                self._base, variables, self._hidden.model, self._mapping, shared, lambda: int(self._iterations)
            )
            if self._world.rank == 0:
                warn_of_rounded_betas(self._base.stepping, [native(variable) for variable in variables])
            # Variables that are made in the graph that is being traced have no values before it runs.
            if all(variable.is_initialized() for variable in self._model.variables):
                self._make()
            self._base.build(variables, self._model.names)  # now: it may begin with copies of the weights
            mixes, period = self._settings.base.mixes_parameters, self._settings.period
            self._counted = CountedSteps(
                self._begun,
                self._model,
                [*self._base.variables, native(self._iterations)],
                "always" if mixes else "never" if period is None else "sometimes",
            )
            self._averages = GradientAverages(self._ready_replica, self._model, self._counted, variables)
            self.__dict__["_trainable_variables"] = variables  # by the name that Keras's callbacks know
            self.built: bool = True

    @unconverted
    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None, loss: Any | None = None
    ) -> None:
        """Take one inner step, and the outer step if it is due.

        Args:
            grads: one for each variable, None where there is none.
            trainable_variables: all that the optimizer was built with, if not given.
            loss: the training loss of this step, a float or a scalar tensor. AdaComm needs it. ``model.fit`` and
                whoever calls ``scale_loss(loss)`` have given it already.

        Raises:
            MismatchError, NonFiniteError: on every rank; see ``lentando.optimizers.replica.Replica``. From a graph,
                TensorFlow raises an error of its own with the same text, except in ``fit`` of the model that was given,
                and inside ``lentando.tensorflow.original_errors()``.
            ConfigurationError: for variables that the optimizer was not built with.
        """
        _check_surroundings()
        check_can_wait(self._world)
        if trainable_variables is None:
            if not self.built:
                raise ConfigurationError("the first step needs the variables: apply(gradients, variables)")
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        self.build(variables)
        unknown = [getattr(v, "path", v.name) for v in variables if not self._averages.knows(v)]
        if unknown:
            raise ConfigurationError(
                f"the optimizer was built for other variables than {unknown}: make a new optimizer when the trainable "
                "variables change (freeze layers first, then wrap and compile)"
            )
        if self._settings.outer is not None and len(variables) < len(self._trainable_variables):
            given = {id(variable) for variable in variables}
            frozen = [v.path for v in self._trainable_variables if id(v) not in given and not v.trainable]
            if frozen:
                raise ConfigurationError(
                    f"{frozen} were frozen after the optimizer was built, and its slow momentum would move them "
                    "further: make a new optimizer when the trainable variables change"
                )
        pairs = list(zip(grads, variables, strict=True))
        if loss is None:
            loss = self._loss_given_to_scale()
        if loss is not None:
            check_loss(loss)
        if tf.executing_eagerly():
            self._step(pairs, loss)
        else:
            self._trace_step(pairs, loss)

    @unconverted
    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], loss: Any | None = None) -> Any:
        """``apply`` for pairs of gradients and variables. Returns the count of steps."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, variables, loss)
        return self._iterations

    @unconverted
    def scale_loss(self, loss: Any) -> Any:
        """As the base optimizer's. ``fit`` calls it with the loss of each step, which is noted for that step."""
        self._scaled_loss = _current_graph(), loss
        return self._base_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """As the base optimizer's: puts this rank's own moving average into the model, if it keeps one.

        ``fit`` calls it when it ends.

        Raises:
            NonFiniteError: on this rank alone, if its weights are not finite, and no outer step will come to say so.
        """
        if self._made is not None:
            self._made.evaluation.check_finite("fit")
        self._base_optimizer.finalize_variable_values(var_list)

    def state_dict(self) -> dict[str, Any]:
        """What decides the next step beside the weights of the model and ``optimizer.variables``: each rank its own."""
        return {"iterations": int(self._iterations), "replica": copied(self._ready_replica().state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken, once the weights and ``optimizer.variables`` have been loaded too.

        Raises:
            ConfigurationError: if the state is another rank's, or of another model, method or world size.
        """
        replica = self._ready_replica()
        self._counted.restart()
        replica.load_state_dict(state_dict["replica"])
        self._iterations.assign(state_dict["iterations"])
        self._counted.refresh()

    def training(self) -> KerasTraining:
        """Model, optimizer and replica as checkpoints see them."""
        if self._mapping is not None:
            raise CheckpointError(
                "a job whose ranks run different frameworks (mapping=) cannot be saved as a whole yet: save each "
                "rank's model by its framework's own means"
            )
        replica = self._ready_replica()
        return KerasTraining(replica, self._model, self._base, self._hidden.model, self._iterations, self._counted)

    def save_own_variables(self, store: Any) -> None:
        """As the base optimizer does, for ``model.save``; with the count of all steps, where it may begin again."""
        for number, variable in enumerate(self.variables):
            counts = variable is self._base.own_iterations
            store[str(number)] = (self._iterations if counts else variable).numpy()

    def load_own_variables(self, store: Any) -> None:
        """As the base optimizer does, for ``model.load_weights``."""
        super().load_own_variables(store)
        self._iterations.assign(self._base.own_iterations)

    def set_weights(self, weights: Any) -> None:
        """Set the values of ``variables``, in that order."""
        super().set_weights(weights)
        self._iterations.assign(self._base.own_iterations)

    def get_config(self) -> dict[str, Any]:
        """The base optimizer's: a file holds a model and its optimizer, and no job of several ranks."""
        return {"optimizer": keras.optimizers.serialize(self._base_optimizer)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """The base optimizer. Wrap it, and compile the loaded model with it, to train on several ranks again."""
        return keras.optimizers.deserialize(config["optimizer"], custom_objects)

    def _ready_replica(self) -> Replica:
        if not self.built:
            raise ConfigurationError(
                "the optimizer has not been built: take a step first, call build(model.trainable_variables), or wrap "
                "it with model= after the model has been built"
            )
        self._counted.settle()
        return self._begun()

    def _describe_base(self) -> str:
        config = self._base_optimizer.get_config()
        shown = {key: value for key, value in config.items() if key != "name" and value not in (None, False)}
        texts = [
            f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value!r}" for key, value in shown.items()
        ]
        return f"{type(self._base_optimizer).__name__}({', '.join(texts)})"

    def _report_steps(self) -> None:
        self._counted.settle()

    def _weights_exchanged(self) -> None:
        self._counted.ask_before_next_step()

    def _refresh(self) -> None:
        self._counted.refresh()

    def _check_resettable(self) -> None:
        if not self._base.resets:
            raise ConfigurationError(
                "restart(base_state='reset') needs the values that the base optimizer began with, which are kept for "
                "base_buffers='reset' and on_nonfinite='skip' only: wrap it with one of these"
            )

    def _begun(self) -> Replica:
        """The replica, made now if it was not. Before the first step, the base optimizer begins from the weights."""
        replica = self._make()
        if not replica.inner_steps:
            self._base.begin()
        return replica

    def _make(self) -> Replica:
        if self._made is None:
            self._model.is_in_graph = self.built
            self._made = Replica(self._world, self._model, self._settings)
            self._model.is_in_graph = False
        return self._made

    def _step(self, pairs: Pairs, loss: Any | None) -> None:
        replica = self._ready_replica()
        rates = self._model.learning_rates()  # of this step: a schedule goes on with it
        if loss is not None:
            loss = float(tf.reshape(loss, [])) if tf.is_tensor(loss) else as_number(loss)
            record_loss(replica, self._model, loss)
        if replica.averages_gradients:
            pairs = self._averages.eager(pairs, loss)
        replica.before_step()
        before = int(self.iterations)
        self._base_step(pairs)
        if int(self.iterations) != before:
            replica.after_steps(1, rates)
            self._counted.refresh()
            replica.stopping.stop_if_agreed()

    def _step_along(self, rates: Sequence[float], overflow: bool) -> bool:
        # ``overflow`` is never set: a ``LossScaleOptimizer`` finds it in the averaged gradients, on all ranks alike.
        gradients = self._model.flat_gradients.scatter()
        own, (rate,) = float(self.learning_rate), rates
        if rate != own:
            self.learning_rate = rate
        before = int(self.iterations)
        self._base_step(list(zip(gradients, self._trainable_variables, strict=True)))
        if rate != own:
            self.learning_rate = own
        return int(self.iterations) != before

    def _trace_step(self, pairs: Pairs, loss: Any | None) -> None:
        counted = self._counted
        period = self._settings.make_period()
        if loss is None and period is not None and needs_loss(period):
            raise ConfigurationError(
                f"{period!r} decides by the training loss, and this graph takes steps without it: call "
                "apply(gradients, variables, loss=loss), or scale_loss(loss) before"
            )
        if self._hidden.model is not None and self._hidden.model.compiled and self._hidden.model.jit_compile:
            raise ConfigurationError(
                "XLA cannot compile a step that communicates: use model.compile(..., jit_compile=False)"
            )
        counted.trace()
        rate = tf.convert_to_tensor(self.learning_rate)
        begun: Any = nullcontext()
        if self._settings.base.averages_gradients:
            pairs = self._averages.traced(pairs, loss)
        else:
            begun = tf.control_dependencies([counted.begin()])
        before = tf.identity(self.iterations) if self._base.accumulation_steps else None
        with begun:
            self._base_step(pairs)
        counted.end(None if before is None else tf.not_equal(before, self.iterations), rate, loss)

    def _base_step(self, pairs: Pairs) -> None:
        with self._model.assignments.paused():
            self._base_optimizer.apply([gradient for gradient, _ in pairs], [variable for _, variable in pairs])
        self._iterations.assign_add(1)

    def _loss_given_to_scale(self) -> Any | None:
        """The loss that ``scale_loss`` was given for this step, if it was, in this graph."""
        noted, self._scaled_loss = self._scaled_loss, None
        return noted[1] if noted is not None and noted[0] is _current_graph() else None


class _Hidden:
    """Holds the model where Keras does not look for what belongs to an optimizer when it saves and loads weights."""

    def __init__(self, model: keras.Model | None) -> None:
        self.model = model


def _named(name: str) -> keras.optimizers.Optimizer:
    """The optimizer that Keras calls so, with Keras's default settings."""
    try:
        return keras.optimizers.get(name)
    except ValueError as error:
        raise ConfigurationError(
            f"Keras knows no optimizer {name!r}: expected a name that keras.optimizers.get takes, such as 'adam', or a "
            "Keras optimizer"
        ) from error


def _check_surroundings() -> None:
    if keras.backend.backend() != "tensorflow":
        raise ConfigurationError(
            f"Keras runs on {keras.backend.backend()!r} here, and lentando.tensorflow needs it on TensorFlow: set "
            "KERAS_BACKEND=tensorflow before Keras is imported, or use lentando.torch without Keras"
        )
    if not tf.compat.v1.executing_eagerly_outside_functions():
        raise ConfigurationError("TensorFlow 2 is needed, with tf.compat.v1.disable_eager_execution() not called")
    if tf.distribute.has_strategy():
        raise ConfigurationError(
            f"{type(tf.distribute.get_strategy()).__name__} of tf.distribute averages gradients by itself: leave it "
            "out, and start one process per device instead"
        )


def _current_graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
