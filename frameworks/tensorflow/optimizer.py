"""The optimizers that Keras users write: a wrapper round their own, which the replica drives."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.capabilities import shares_memory
from lentando.comm.collectives import Algorithm
from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.world import transport
from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.flat_report import flat_report
from lentando.optimizers.loss import as_number
from lentando.optimizers.replica import BaseState, Replica
from lentando.optimizers.replica.resume import copied
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.period import PeriodSetting, needs_loss
from lentando.optimizers.rules.settings import BaseBuffers, Settings
from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.checkpoint_state import KerasTraining
from lentando.tensorflow.description import describe_optimizer
from lentando.tensorflow.fixed_state import check_synchronized
from lentando.tensorflow.forwarding import ForwardsSettings
from lentando.tensorflow.gradient_averages import GradientAverages, Pairs
from lentando.tensorflow.graph import CountedSteps, check_can_wait, check_loss, record_loss, unconverted
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.original_errors import convert_errors_of
from lentando.tensorflow.precision import warn_of_rounded_betas
from lentando.tensorflow.state_variables import native

__all__ = ["DistributedOptimizer"]


@keras.saving.register_keras_serializable("lentando")
class DistributedOptimizer(ForwardsSettings, keras.optimizers.Optimizer):  # type: ignore[misc]
    """A Keras optimizer whose model is one of the job's replicas.

    Wraps any Keras 3 optimizer and is one itself: in ``model.compile`` and ``fit``, in a ``tf.function`` and in an
    eager loop. Settings (``learning_rate``, ``momentum``, ``clipnorm``, ...) are the base optimizer's, whether they are
    read or changed here or there, so that callbacks and schedules work. ``AllReduce`` averages before clipping.

    All ranks take over rank 0's weights at construction if ``model`` is built, else in the first step, whose gradients
    are then those of the rank's own. An inner step is one update of the weights: with
    ``gradient_accumulation_steps=k``, every k-th call of ``apply``.

    Args:
        optimizer: the base optimizer; or what ``keras.optimizers.get`` makes one of, such as ``"adam"``.
        model: the model, whose floating-point statistics (of BatchNorm) are averaged at outer steps, and whose frozen
            and integer weights are taken over from rank 0.
        base: what replicas say to each other at each step: ``AllReduce()``, ``LocalSGD()``, ...
        outer: ``SlowMomentum(...)`` or ``OuterSGD(...)`` at each outer step, or None to adopt the exact average.
        period: inner steps between outer steps, or a ``Period``; None for no outer steps.
        base_buffers: what an outer step does to the base optimizer's state: "reset" makes it new, "maintain" leaves it,
            "average" averages its buffers over the ranks. "auto" is "maintain" if it has second moments (Adam, RMSprop,
            ...; told by a hyperparameter whose name begins with "eps"), else "reset".
        exact_average: False leaves out the average: each replica applies the outer rule to itself.
        algorithm: how the exact average is formed: "auto", "ring", "engine", or "measured", which compares all ways
            once in a job, so that another start of the job may round otherwise.
        on_nonfinite: what is done about a rank whose parameters, gradients or loss are not finite when the ranks
            communicate: "raise" an error on every rank, that names it, or "skip" it in the average, and restore it from
            that, with a new base optimizer. A ``LossScaleOptimizer`` sees to gradients itself.
        rates_may_differ: learning rates that differ between ranks are intended. Else they are an error at construction
            and one warning when they come apart later, as far as messages travel that show it: with every average of
            gradients and every outer step, but not with gossip alone.
        mapping: for a job whose other ranks run PyTorch: from that model's names and axes to this one's.

    Raises:
        NotInitializedError: before ``init()``.
        ConfigurationError: for settings that cannot work.
        MismatchError: on every rank, if models or settings differ between ranks.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        model: keras.Model | None = None,
        base: BaseAlgorithm = AllReduce(),
        outer: OuterRule | None = None,
        period: PeriodSetting = None,
        base_buffers: BaseBuffers = "maintain",
        exact_average: bool = True,
        algorithm: Algorithm = "auto",
        on_nonfinite: OnNonFinite = "raise",
        rates_may_differ: bool = False,
        mapping: WeightMap | None = None,
    ) -> None:
        world = transport()
        settings = Settings(base, outer, period, base_buffers, exact_average, algorithm, on_nonfinite, rates_may_differ)
        _check_surroundings()
        if isinstance(base, AllReduce) and base.overlap:
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
        if mapping is not None and base_buffers == "average":
            raise ConfigurationError(
                "base_buffers='average' is not possible beside another framework (mapping=), whose optimizers keep "
                "other things: use 'reset' or 'maintain'"
            )
        self._world = world
        self._mapping = mapping
        self._settings = settings
        does_reset = settings.for_optimizer(describe_optimizer(optimizer)).base_buffers == "reset"
        self._base = BaseOptimizer(optimizer, does_reset or on_nonfinite == "skip", self._iterations)
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
    def period(self) -> int | None:
        """Inner steps of the current round, None if there are no outer steps. Equal on all ranks."""
        return self._replica.period

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
            self._averages = GradientAverages(lambda: self._replica, self._model, self._counted, variables)
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
            self._made.check_finite("fit")
        self._base_optimizer.finalize_variable_values(var_list)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let ranks have unequal numbers of batches inside the block; see ``lentando.tensorflow.join``."""
        with self._replica.join(self._step_along):
            yield
            self._counted.settle()
        self._counted.refresh()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate the average: inside the block the model is the exact average of all replicas, after it itself again.

        Collective: every rank enters the block. The average is for reading: steps, ``fit``, ``lt.save`` and ``lt.load``
        inside are an error, and what is assigned to the weights is lost when the block ends. ``get_weights()`` copies
        the average; a ``tf.Variable`` that is kept holds this rank's own weights again after the block.

        Raises:
            NonFiniteError: on every rank, if parameters are not finite on one of them.
        """
        replica = self._replica
        with replica.averaged():
            self._counted.ask_before_next_step()
            yield

    def restart(self, *, base_state: BaseState = "keep") -> None:
        """Begin a new round from the present weights: their average over the ranks becomes weights and anchor.

        Collective: every rank calls it, eagerly, between steps, such as after it has restored earlier weights. Weights
        that are equal on all ranks stay exactly as they are. The outer momentum begins at zero, and the next outer step
        follows a whole period later.

        Args:
            base_state: of the base optimizer: "keep" it, or "reset" it to that of a new one, which needs an optimizer
                that was wrapped with ``base_buffers="reset"`` or ``on_nonfinite="skip"``.

        Raises:
            ConfigurationError: in the middle of a step, inside ``join`` or ``averaged()``, or if the base optimizer
                cannot be reset.
            NonFiniteError, MismatchError: on every rank; see ``lentando.optimizers.replica.Replica``.
        """
        if base_state == "reset" and not self._base.resets:
            raise ConfigurationError(
                "restart(base_state='reset') needs the values that the base optimizer began with, which are kept for "
                "base_buffers='reset' and on_nonfinite='skip' only: wrap it with one of these"
            )
        self._replica.restart(base_state)
        self._counted.refresh()

    def consensus_distance(self) -> float:
        """How far the replicas are apart: the root mean square over ranks of their parameters' distance from the mean.

        Collective: every rank calls it.
        """
        return self._replica.consensus_distance()

    def report(self, *, flat: bool = False) -> dict[str, Any]:
        """Plain numbers about communication so far; see ``lentando.optimizers.replica.Replica.report``.

        Predictions take milliseconds: nothing to ask for at every step.

        Args:
            flat: one number for each name, as TensorBoard and other loggers take them: what is not known and the
                list of decisions are left out, and lists by rank become ``NAME/RANK``.
        """
        report = self._replica.report()
        return flat_report(report) if flat else report

    def state_dict(self) -> dict[str, Any]:
        """What decides the next step beside the weights of the model and ``optimizer.variables``: each rank its own."""
        return {"iterations": int(self._iterations), "replica": copied(self._replica.state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken, once the weights and ``optimizer.variables`` have been loaded too.

        Raises:
            ConfigurationError: if the state is another rank's, or of another model, method or world size.
        """
        replica = self._replica
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
        replica = self._replica
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

    @property
    def _replica(self) -> Replica:
        """The replica, with all steps told."""
        if not self.built:
            raise ConfigurationError(
                "the optimizer has not been built: take a step first, call build(model.trainable_variables), or wrap "
                "it with model= after the model has been built"
            )
        self._counted.settle()
        return self._begun()

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
        replica = self._replica
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
            replica.stop_if_agreed()

    def _step_along(self, rates: Sequence[float], overflow: bool) -> bool:
        """Step along the averaged gradients, as the ranks do that still have batches.

        ``overflow`` is never set here: a ``LossScaleOptimizer`` finds it in the averaged gradients, on all ranks alike.
        """
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
