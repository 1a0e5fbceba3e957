"""The distributed optimizer for Keras: a wrapper around the user's optimizer that trains one of the replicas."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from lentando.comm.capabilities import shares_memory
from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Average, Op
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.horovod_arguments import wire_dtype_of, with_reduction
from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.methods import SettingsArguments
from lentando.optimizers.model_argument import check_model, not_by_name
from lentando.optimizers.replica_optimizer import check_not_wrapped
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.settings import Settings
from lentando.tensorflow.backward_passes import BackwardPasses
from lentando.tensorflow.base_optimizer import BaseOptimizer, as_optimizer
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.counted_steps import check_loss
from lentando.tensorflow.description import describe_optimizer, short_description
from lentando.tensorflow.environment import check_environment
from lentando.tensorflow.fixed_state import check_synchronized
from lentando.tensorflow.local_variables import LocalVariables
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.original_errors import convert_errors_of
from lentando.tensorflow.precision import warn_of_rounded_betas
from lentando.tensorflow.python_calls import check_can_wait, unconverted
from lentando.tensorflow.replica_optimizer import HiddenModel, KerasReplicaOptimizer
from lentando.tensorflow.saved_optimizer import SavesBaseOptimizer
from lentando.tensorflow.state_variables import native
from lentando.tensorflow.steps import Steps
from lentando.tensorflow.variable_groups import check_variable_groups

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DistributedOptimizer"]


@keras.saving.register_keras_serializable("lentando")
@takes_arguments_of(Settings, SettingsArguments)
class DistributedOptimizer(KerasReplicaOptimizer, SavesBaseOptimizer):
    """A Keras optimizer whose model is one of the job's replicas.

    Wraps any Keras 3 optimizer and is one itself: in ``model.compile`` and ``fit``, in a ``tf.function`` and in an
    eager loop. Hyperparameters (``learning_rate``, ``momentum``, ``clipnorm``, ...) are those of the base optimizer,
    whether they are read or changed here or there, so that callbacks and schedules work. ``AllReduce`` averages the
    gradients before they are clipped, and after the whole backward pass (its ``overlap`` exists in PyTorch only).

    All ranks take the weights of rank 0: at construction if ``model`` is built, otherwise in the first step, whose
    gradients are then those of the rank's own weights. An inner step is one update of the weights: with
    ``gradient_accumulation_steps=k``, every k-th call of ``apply``. With ``on_nonfinite``, a ``LossScaleOptimizer``
    handles gradients that are not finite itself.

    Args:
        optimizer: the base optimizer, which takes the inner steps, or a name that ``keras.optimizers.get`` takes, such
            as ``"adam"``. An optimizer of ``tf.compat.v1.train`` gets a wrapper that averages gradients, as in Horovod.
        name: name of this optimizer.
        use_locking: no effect, like the next two: Keras updates variables as the base optimizer does, and gradients are
            averaged in host memory.
        device_dense: no effect.
        device_sparse: no effect.
        compression: ``Compression.none``, ``fp16`` or ``bf16``: how gradients are rounded while they are sent.
        sparse_as_dense: no effect: sparse gradients (of embeddings) are always reduced with all rows.
        backward_passes_per_step: calls of ``apply`` whose gradients are summed on each rank. The last one takes the
            step; the others do not communicate.
        op: how the gradients of the ranks are combined: ``Average``, ``Sum``, or ``Adasum``, with which every rank
            takes its own step, and the steps are combined (``AdasumDeltas``).
        gradient_predivide_factor: factor by which gradients are divided before the average and multiplied after it.
        average_aggregated_gradients: whether the sum of ``backward_passes_per_step`` gradients is divided by their
            number.
        num_groups: older name of ``groups``.
        groups: number of groups, or lists of variables, whose gradients Horovod sends together. It is checked, and has
            no effect: all gradients are sent together.
        process_set: the ranks that train together. A rank that is not a member trains alone.
        scale_local_gradients: whether gradients of local variables (``register_local_var``) are divided by the number
            of ranks.
        model: the model. Its floating-point statistics (of BatchNorm) are averaged at outer steps, and its frozen and
            integer weights are taken from rank 0. None if the optimizer's variables are all that is trained.
        mapping: a ``WeightMap`` from the names and axes of a PyTorch model to those of this one, for a job whose other
            ranks run PyTorch.
        **settings: keyword arguments of ``lentando.optimizers.Settings``.

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
        name: str | None = None,
        use_locking: bool = False,
        device_dense: str = "",
        device_sparse: str = "",
        compression: type[Compressor] = Compression.none,
        sparse_as_dense: bool = False,
        backward_passes_per_step: int = 1,
        op: Op = Average,
        gradient_predivide_factor: float = 1.0,
        average_aggregated_gradients: bool = False,
        num_groups: int = 0,
        groups: int | Sequence[Iterable[Any]] | None = None,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
        *,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[SettingsArguments]",
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise not_by_name("name", "the name of the optimizer, a string", name)
        check_model(model, keras.Model, "keras.Model")
        world = transport_of(process_set) if process_set.included() else SingleTransport()
        check_variable_groups(backward_passes_per_step, num_groups, groups)
        method = with_reduction(Settings(**settings), op, wire_dtype_of(compression), gradient_predivide_factor)
        check_environment()
        if isinstance(method.base, AllReduce) and method.base.overlap:
            raise ConfigurationError("AllReduce(overlap=True) exists in PyTorch only: leave overlap out")
        optimizer = as_optimizer(optimizer)
        check_not_wrapped(optimizer, getattr(optimizer, "inner_optimizer", None))
        super().__init__(learning_rate=0.0, name=name or f"distributed_{optimizer.name}")
        if mapping is not None and method.base_buffers == "average":
            raise ConfigurationError(
                "base_buffers='average' is not possible in a job with another framework (mapping=), whose optimizers "
                "have different buffers: use 'reset' or 'maintain'"
            )
        self._world = world
        self._mapping = mapping
        self._settings = method
        does_reset = method.for_optimizer(describe_optimizer(optimizer)).base_buffers == "reset"
        self._base = BaseOptimizer(optimizer, does_reset or method.on_nonfinite == "skip", self._iterations)
        self._hidden = HiddenModel(model)
        self._local = LocalVariables(lambda: world.size, scale_local_gradients)
        self._passes = backward_passes_per_step, average_aggregated_gradients
        self._base_optimizer = optimizer
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
        """The learning rate of the base optimizer."""
        return self._base.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._base.learning_rate = value

    @property
    def iterations(self) -> Any:
        """Number of steps taken. Unlike the base optimizer's, it continues when an outer step resets the optimizer."""
        return self._base.updates

    def build(self, variables: Iterable[Any]) -> None:
        """Create the replica: all ranks check that they train the same model, and take rank 0's weights.

        Collective. Called by Keras, or by the first step.

        Args:
            variables: the variables to train.
        """
        if self.built:
            return
        # Outside the graph that is being traced, which would do it at every step.
        with nullcontext() if tf.executing_eagerly() else tf.init_scope():
            variables = list(variables)
            passes, takes_mean = self._passes
            check_synchronized(self._hidden.model, self._world.size)
            shared = shares_memory(self._world)
            self._model = KerasModel(
                self._base,
                self._local.shared(variables),
                self._hidden.model,
                self._mapping,
                shared,
                lambda: int(self._iterations),
            )
            if self._world.rank == 0:
                warn_of_rounded_betas(self._base.stepping, [native(variable) for variable in variables])
            self._steps = Steps(
                self._world,
                self._settings,
                self._model,
                self._base,
                variables,
                self._local,
                BackwardPasses(passes, takes_mean, variables) if passes > 1 else None,
                self._iterations,
                self._hidden.model,
            )
            self.__dict__["_trainable_variables"] = variables  # the name that Keras's callbacks read
            self.built: bool = True

    def register_local_var(self, var: Any) -> None:
        """Leave out a variable that every rank has for itself, such as its part of an embedding, from averages.

        Args:
            var: a variable that the optimizer trains.

        Raises:
            ConfigurationError: once the optimizer has been built, or with ``model=``, whose weights come from rank 0.
        """
        if self.built or self._hidden.model is not None:
            raise ConfigurationError(
                "register_local_var must be called before the first step, for an optimizer without model=, because all "
                "other variables take rank 0's values when the optimizer is built"
            )
        self._local.register(var)

    @unconverted
    def apply(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | None = None,
        loss: Any | None = None,
        samples: Any | None = None,
    ) -> None:
        """Take one inner step, and the outer step if it is due.

        Args:
            grads: gradients, one for each variable; None for a variable without gradient.
            trainable_variables: variables of the gradients; all that the optimizer was built with by default.
            loss: training loss of this step, a float or a scalar tensor. AdaComm needs it. It need not be passed in
                ``model.fit``, nor after a call of ``scale_loss(loss)``.
            samples: number of samples of this step's batch, on this rank, a number or a scalar tensor.
                ``weighting="samples"`` needs it.

        Raises:
            MismatchError: on every rank, if the ranks are not at the same step.
            NonFiniteError: on every rank, if values that are averaged are not finite.
            ConfigurationError: for variables that the optimizer was not built with.

        In a graph, TensorFlow replaces errors by its own with the same text, except in ``fit`` of a model that was
        passed as ``model=``, and inside ``lentando.tensorflow.original_errors()``.
        """
        check_environment()
        check_can_wait(self._world)
        if trainable_variables is None:
            if not self.built:
                raise ConfigurationError("the first step needs the variables: apply(gradients, variables)")
            trainable_variables = self._trainable_variables
        variables = list(trainable_variables)
        self.build(variables)
        self._steps.check_variables(variables)
        pairs = list(zip(grads, variables, strict=True))
        if loss is None:
            loss = self._loss_given_to_scale()
        if loss is not None:
            check_loss(loss)
        self._steps.take(pairs, loss, samples)

    @unconverted
    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]], loss: Any | None = None, samples: Any | None = None
    ) -> Any:
        """Call ``apply`` for pairs of gradient and variable. Returns the number of steps."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, variables, loss, samples)
        return self._iterations

    @unconverted
    def scale_loss(self, loss: Any) -> Any:
        """Scale a loss as the base optimizer does, and note it as the loss of this step. Called by ``fit``."""
        self._scaled_loss = _current_graph(), loss
        return self._base_optimizer.scale_loss(loss)

    def _describe_base(self) -> str:
        return short_description(self._base_optimizer)

    def _loss_given_to_scale(self) -> Any | None:
        """The loss that was passed to ``scale_loss`` for this step, in the same graph; None if there is none."""
        noted, self._scaled_loss = self._scaled_loss, None
        return noted[1] if noted is not None and noted[0] is _current_graph() else None


def _current_graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
