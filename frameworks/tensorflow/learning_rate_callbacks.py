"""Horovod's Keras callbacks that change the learning rate by epoch or by batch, with momentum correction."""

import sys
from collections.abc import Callable
from typing import Any

import keras

from lentando.comm.errors import ConfigurationError
from lentando.comm.world import rank, size
from lentando.tensorflow.base_optimizer import stepping_of
from lentando.tensorflow.keras_internals import learning_rate_setting
from lentando.tensorflow.optimizer import DistributedOptimizer
from lentando.tensorflow.state_variables import native, state_variables

__all__ = ["LearningRateScheduleCallback", "LearningRateWarmupCallback"]


class LearningRateScheduleCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Set the learning rate to ``initial_lr * multiplier(epoch)``, in some of the epochs.

    Momentum correction (Goyal et al., 2017, section 3): the momentum of SGD and RMSprop in Keras contains the learning
    rate of the steps that it sums. When the rate changes from ``a`` to ``b``, it is multiplied by ``b / a``, as if all
    of these steps had been taken with ``b``. It begins at zero again after a rate of 0.

    Args:
        initial_lr: learning rate that the multiplier is applied to.
        multiplier: function of the epoch that returns the factor. Or a number, for exponential decay:
            ``multiplier ** (epoch - start_epoch)``.
        start_epoch: first epoch in which the rate is set.
        end_epoch: first epoch in which it is no longer set, None for no end.
        staircase: whether the rate is set at the first batch of an epoch, with the number of the epoch; otherwise at
            every batch, with ``epoch + batch / steps_per_epoch``.
        momentum_correction: whether to correct the momentum of SGD and RMSprop.
        steps_per_epoch: batches of an epoch; by default as ``fit`` knows it. Used if ``staircase`` is False.

    Raises:
        ConfigurationError: when training begins, if the optimizer has a learning-rate schedule of its own, or if the
            number of batches of an epoch is needed and not known.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[Any], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ConfigurationError("initial_lr is needed: the learning rate that the multiplier is applied to")
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        self.multiplier = multiplier if callable(multiplier) else self._decay(multiplier)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Check that the learning rate can be set, and find the number of batches of an epoch."""
        if isinstance(learning_rate_setting(self._stepping()), keras.optimizers.schedules.LearningRateSchedule):
            raise ConfigurationError(
                f"{type(self).__name__} cannot set the learning rate of an optimizer that has a schedule "
                "(keras.optimizers.schedules): give the optimizer a number, or leave the callback out"
            )
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ConfigurationError(
                    f"the number of batches of an epoch is not known: pass steps_per_epoch= to {type(self).__name__}"
                )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Remember the number of the epoch."""
        self.current_epoch = epoch

    def on_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Set the learning rate, if it is due."""
        epoch = self.current_epoch
        if epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if not self.staircase:
            assert self.steps_per_epoch is not None
            self._set(self.initial_lr * self.multiplier(epoch + batch / self.steps_per_epoch))
        elif batch == 0:
            self._set(self.initial_lr * self.multiplier(epoch))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the learning rate to the logs, as ``lr``."""
        if logs is not None:
            logs["lr"] = self._rate()

    def _decay(self, base: float) -> Callable[[float], float]:
        return lambda epoch: float(base ** (epoch - self.start_epoch))

    def _rate(self) -> float:
        return float(self.model.optimizer.learning_rate)

    def _set(self, rate: float) -> None:
        before = self._rate()
        self.model.optimizer.learning_rate = rate
        ratio = self._rate() / before if before else 0.0
        if self.momentum_correction and ratio != 1.0:
            for momentum in self._momenta():
                momentum.assign(momentum * ratio)

    def _momenta(self) -> list[Any]:
        """The variables of the base optimizer that sum its past steps, each with its learning rate."""
        stepping = self._stepping()
        if not isinstance(stepping, keras.optimizers.SGD | keras.optimizers.RMSprop) or not stepping.built:
            return []
        state = state_variables(stepping, self.model.trainable_variables)
        return [native(entry.variable) for entry in state if entry.kind == "momentum"]

    def _stepping(self) -> Any:
        optimizer = self.model.optimizer
        return stepping_of(optimizer.base_optimizer if isinstance(optimizer, DistributedOptimizer) else optimizer)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raise the learning rate linearly from ``initial_lr / size()`` to ``initial_lr`` during the first epochs.

    With ``e = epoch + (batch + 1) / steps_per_epoch``, the rate on ``n`` ranks is ``initial_lr / n * (e * (n - 1) /
    warmup_epochs + 1)`` (Goyal et al., 2017, section 2.2): the last batch of the warm-up has the full rate.

    Args:
        initial_lr: learning rate at the end of the warm-up.
        warmup_epochs: number of epochs.
        momentum_correction: as for ``LearningRateScheduleCallback``.
        steps_per_epoch: batches of an epoch; by default as ``fit`` knows it.
        verbose: whether rank 0 prints a line when the warm-up is over: 0 or 1.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            initial_lr,
            self._warm_up,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.warmup_epochs = warmup_epochs
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the learning rate to the logs, and print it when the warm-up is over."""
        super().on_epoch_end(epoch, logs)
        if epoch == self.warmup_epochs - 1 and self.verbose and rank() == 0:
            sys.stdout.write(f"\nEpoch {epoch + 1}: the warm-up ends with a learning rate of {self._rate():g}\n")

    def _warm_up(self, epoch: float) -> float:
        assert self.steps_per_epoch is not None
        ranks = size()
        return ((epoch + 1 / self.steps_per_epoch) * (ranks - 1) / self.warmup_epochs + 1) / ranks
