"""``DistributedOptimizer`` for PyTorch: a wrapper around the user's optimizer that drives a replica."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lentando.comm.capabilities import shares_memory, takes_device_arrays
from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Average, Op
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.horovod_arguments import check_groups, wire_dtype_of, with_reduction
from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.loss_argument import as_number, check_closure, not_one_number
from lentando.optimizers.methods import SettingsArguments
from lentando.optimizers.model_argument import check_model
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica_optimizer import ReplicaOptimizer, check_not_wrapped
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.settings import Settings
from lentando.torch.checkpoint_state import TorchTraining
from lentando.torch.compression import Compression, Compressor
from lentando.torch.description import short_description
from lentando.torch.grad_scaler import have_finite_gradients, unscale
from lentando.torch.gradient_averages import GradientAverages
from lentando.torch.horovod_methods import HorovodMethods
from lentando.torch.model import TorchModel
from lentando.torch.parameters import checked_named_parameters
from lentando.torch.trainer_check import check_trainer
from lentando.torch.wrapped import WrappedOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DistributedOptimizer"]

NamedParameters = Iterable[tuple[str, torch.Tensor]]


@takes_arguments_of(Settings, SettingsArguments)
class DistributedOptimizer(ReplicaOptimizer, HorovodMethods, WrappedOptimizer):
    """A PyTorch optimizer whose model is one of the job's replicas.

    Wraps any ``torch.optim.Optimizer`` and is one itself: ``param_groups`` and ``state`` are those of the base
    optimizer, so that learning-rate schedulers may be attached to either, and ``GradScaler``, closures and gradient
    accumulation work (an inner step is one call of ``step``). At construction all ranks take the model of rank 0.
    Parameters may be frozen, unfrozen, added and removed later, at the same step on every rank. The change takes effect
    the next time that the ranks communicate, and what was trained before keeps its state.

    Args:
        optimizer: the base optimizer, which takes the inner steps. It stays usable and is not changed.
        named_parameters: pairs of name and parameter that provide the names for messages where there is no ``model``:
            all parameters of the optimizer, as for Horovod.
        compression: ``Compression.none``, ``fp16`` or ``bf16``: how gradients are rounded while they are sent.
        backward_passes_per_step: backward passes before each ``step()``. Needed only where gradients are reduced during
            the backward pass (``AllReduce(overlap=...)``), and saves time there.
        op: how the gradients of the ranks are combined: ``Average``, ``Sum``, or ``Adasum``, with which every rank
            takes its own step, and the steps are combined (``AdasumDeltas``).
        gradient_predivide_factor: factor by which gradients are divided before the average and multiplied after it.
        num_groups: older name of ``groups``.
        groups: number of groups, or lists of parameters, whose gradients Horovod sends together. It is checked, and has
            no effect: all gradients are sent together.
        sparse_as_dense: whether sparse gradients (of embeddings) are averaged like dense ones; otherwise the rows that
            the ranks have are gathered.
        process_set: the ranks that train together. A rank that is not a member trains alone.
        model: the model. Its floating-point buffers (BatchNorm statistics) are averaged at outer steps, its frozen
            parameters and integer buffers are taken from rank 0, and its names appear in messages. None if the
            optimizer's parameters are all that is trained.
        **settings: keyword arguments of ``lentando.optimizers.Settings``.

    Example:
        >>> import torch, lentando.torch as lt
        >>> lt.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = lt.DistributedOptimizer(sgd, model=model, base=lt.SGP())
        >>> loss = model(torch.ones(8, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
        >>> optimizer.report()["inner_steps"]
        1
        >>> lt.shutdown()
    """

    # With this mark torch.amp.GradScaler always calls step(), and passes on whether gradients have overflowed: a rank
    # that skipped a step alone would be one step behind the others.
    _step_supports_amp_scaling = True
    found_inf: torch.Tensor | None = None  # set by GradScaler during a step

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: NamedParameters | None = None,
        compression: type[Compressor] = Compression.none,
        backward_passes_per_step: int = 1,
        op: Op = Average,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: int | Sequence[Iterable[torch.Tensor]] | None = None,
        sparse_as_dense: bool = False,
        process_set: ProcessSet = global_process_set,
        *,
        model: torch.nn.Module | None = None,
        **settings: "Unpack[SettingsArguments]",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigurationError(f"expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}")
        check_model(model, torch.nn.Module, "torch.nn.Module")
        # A program that was written for Horovod passes names and no model.
        self._is_horovod_program = model is None and named_parameters is not None
        if model is None and named_parameters is not None:
            named_parameters = checked_named_parameters(optimizer, named_parameters)
        world = transport_of(process_set) if process_set.included() else SingleTransport()
        check_groups(backward_passes_per_step, num_groups, groups, torch.Tensor)
        self._settings = with_reduction(Settings(**settings), op, wire_dtype_of(compression), gradient_predivide_factor)
        check_not_wrapped(optimizer)
        check_trainer(model, world.size)
        super().__init__(optimizer)
        self._step_outside_graph = torch.compiler.disable(DistributedOptimizer.step)  # type: ignore[no-untyped-call]
        self._model = TorchModel(
            optimizer,
            model,
            named_parameters,
            takes_device_arrays(world),
            shares_memory(world),
            sparse_as_dense,
        )
        base = self._settings.base
        if isinstance(base, AllReduce) and base.overlap and not self._model.is_on_host:
            raise ConfigurationError("AllReduce(overlap=True) needs the parameters in host memory: leave overlap out")
        self._replica = Replica(world, self._model, self._settings, optimizers_may_differ=self._is_horovod_program)
        self._gradients_are_averaged = False
        self._gradients = GradientAverages(self._replica, self._model, backward_passes_per_step)

    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None, samples: float | None = None) -> Any:
        """Take one inner step, and the outer step if it is due.

        Args:
            closure: function that computes the gradients and returns the loss, as the base optimizer takes it.
            loss: training loss of this step, a float or a scalar tensor. AdaComm needs it.
            samples: number of samples of this step's batch, on this rank. ``weighting="samples"`` needs it.

        Returns:
            What the base optimizer returns: the loss of the closure, or None. With ``AllReduce`` the loss is the mean
            over the ranks.

        Raises:
            MismatchError: on every rank, if the ranks are not at the same step.
            NonFiniteError: on every rank, if parameters, gradients or the loss of one of them are not finite.
                Parameters are unchanged; gradients may hold their average, which is not finite.
            ConfigurationError: if the wrapped parameters were replaced, if the loss is needed and missing, for a
                closure that is no function, or for one with ``AllReduce`` inside ``join``.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._step_outside_graph(self, closure, loss=loss, samples=samples)
        replica = self._replica
        if closure is not None:
            check_closure(closure)
            self._check_joinable("step(closure), which may average gradients several times in a step,")
        overflow = self.found_inf is not None and unscale(
            self.param_groups, self.found_inf, getattr(self, "grad_scale", None)
        )
        if loss is not None:
            loss = _detached(loss)
        is_counted = loss is not None and (not overflow or replica.needs_loss)  # with overflow it may well be infinite
        losses = [loss] if is_counted else []
        are_averaged, self._gradients_are_averaged = self._gradients_are_averaged, False
        if are_averaged and self._is_horovod_program and not self._skips_synchronize:
            self._warn_of_second_reduction()
        if overflow and are_averaged:  # GradScaler may have looked at gradients that the average has left out since
            overflow = not have_finite_gradients(self.param_groups)
        # If the gradients of one rank were not finite, the average is finite on no rank, even if GradScaler looked
        # before the gradients were averaged.
        if replica.averages_gradients:
            overflow = replica.gradients.settle_deferred(expected=self.found_inf is not None) or overflow
        if closure is not None:
            closure = self._observed(closure, losses if loss is None else [loss])
        elif replica.averages_gradients and not are_averaged:
            overflow = self._gradients.average(None if loss is None else float(loss), overflow)[1]
        replica.before_step()
        result = None
        if not overflow:
            result = self._base_optimizer.step() if closure is None else self._base_optimizer.step(closure)
        if replica.averages_gradients:
            self._gradients.begin_step()
        if losses:
            replica.record_loss(losses[0])
        if samples is not None:
            replica.rank_weights.record_samples(samples)
        replica.after_step()
        return result

    def synchronize(self, *, loss: Any = None) -> Any:
        """Average the gradients now, for example to clip them before ``step``, which does not average them again.

        A closure may call it after its backward pass, with the same effect.

        Args:
            loss: training loss, a float or a scalar tensor, if its mean over the ranks is needed.

        Returns:
            The mean of ``loss`` over the ranks as a float, or ``loss`` itself if the method does not average gradients.
        """
        self._check_joinable("synchronize()")
        if not self._replica.averages_gradients:
            return loss
        own_loss = None if loss is None else float(_detached(loss))
        # Deferred because only step() can see whether a GradScaler is in use, which expects occasional overflow.
        mean_loss, _ = self._gradients.average(own_loss, overflow=False, defer=True)
        self._gradients_are_averaged = True
        return None if loss is None else mean_loss

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Return a block for all backward passes of a step but the last, which only accumulate gradients.

        Needed only where ``AllReduce`` overlaps, which then sends gradients during the backward pass. Other base
        algorithms send nothing before ``step``.
        """
        with self._gradients.paused():
            yield

    def training(self) -> TorchTraining:
        """Return the state of model, optimizer and replica in the form that checkpoints save and load."""
        return TorchTraining(self._replica, self._model)

    def _ready_replica(self) -> Replica:
        return self._replica

    def _describe_base(self) -> str:
        return short_description(self._base_optimizer)

    def _before_join(self) -> AbstractContextManager[object]:
        return self._gradients.enter_join()

    def _step_along(self, rates: Sequence[float], overflow: bool) -> bool:
        self._model.flat_gradients.scatter()
        if not overflow:
            rates_here = self._model.learning_rates()
            self._model.set_learning_rates(rates)
            self._base_optimizer.step()
            self._model.set_learning_rates(rates_here)
        return True

    def _check_joinable(self, call: str) -> None:
        if self._replica.joined and self._replica.averages_gradients:
            raise ConfigurationError(
                f"{call} is not possible inside join with a base algorithm that averages gradients: ranks that have "
                "run out of batches step along the averaged gradients, and cannot repeat what is done to them before"
            )

    def _observed(self, closure: Callable[[], Any], losses: list[Any]) -> Callable[[], Any]:
        """Wrap the closure so that its loss is noted, and its gradients averaged if the base algorithm does that.

        Args:
            closure: function that computes the gradients and returns the loss.
            losses: list that receives the loss, unless it has one already.
        """

        def observed() -> Any:
            with torch.enable_grad():
                loss = closure()
            if not losses and loss is not None:  # the first of several is at the parameters that the step begins with
                losses.append(_detached(loss))
            if self._gradients_are_averaged:  # by the closure, which has called synchronize(), for example to clip them
                self._gradients_are_averaged = False
                self._replica.gradients.settle_deferred(expected=False)
            elif self._replica.averages_gradients:
                # The mean loss, so that an optimizer that decides by the loss (LBFGS) decides the same on all ranks.
                return self._gradients.average(None if loss is None else float(_detached(loss)), overflow=False)[0]
            return loss

        return observed


def _detached(loss: Any) -> Any:
    """Return a loss that can be added up: a number if reading it costs nothing, otherwise a scalar on the device.

    Raises:
        ConfigurationError: if it is not a single number.
    """
    if not isinstance(loss, torch.Tensor):
        return as_number(loss)
    if loss.numel() != 1:
        raise not_one_number(loss.shape)
    return loss.item() if loss.is_cpu else loss.detach()


# With this mark torch puts no profiler scope around step(), which would need attributes that its constructor makes.
DistributedOptimizer.step.hooked = True  # type: ignore[attr-defined]
