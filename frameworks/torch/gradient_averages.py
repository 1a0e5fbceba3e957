"""Gradients of a PyTorch model, averaged over the ranks before a step, or while the backward pass computes others."""

from contextlib import AbstractContextManager, nullcontext

from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.gradient_buckets import Buckets
from lentando.torch.model import TorchModel
from lentando.torch.overlap import OverlapHooks
from lentando.torch.sparse_gradients import average_sparse

__all__ = ["GradientAverages"]


class GradientAverages:
    """Averages the gradients of a model, and starts to do so during the backward pass with ``AllReduce(overlap=True)``.

    Args:
        replica: replica that the model belongs to.
        model: model whose gradients are averaged.
        passes: number of backward passes in each step.
    """

    def __init__(self, replica: Replica, model: TorchModel, passes: int = 1) -> None:
        self._replica = replica
        self._model = model
        self.passes = passes
        self._overlap: OverlapHooks | None = None
        self._follow_buckets()

    def average(self, loss: float | None, overflow: bool, *, defer: bool = False) -> tuple[float, bool]:
        """Average gradients and loss over the ranks, and exchange whether gradients have overflowed.

        Args:
            loss: the training loss that these gradients belong to, if there is one.
            overflow: whether the gradients of this rank have overflowed.
            defer: whether an error about gradients that are not finite is kept for ``Gradients.settle_deferred``.

        Returns:
            The mean loss, and whether the gradients of any rank have overflowed.
        """
        if self._model.has_changed():
            self._replica.follow_changes()
        self._follow_buckets()
        gradients = self._model.flat_gradients
        if self._overlap is None or self._replica.joined:
            gradients.gather(in_place=self._replica.gradients.may_stay)
        else:
            gradients.gather(are_copied=self._overlap.finish())
        try:
            averaged = self._replica.average_gradients(loss, overflow, defer=defer)
            if sparse := gradients.scatter():
                average_sparse(self._replica, gradients.parameters, sparse, gradients.names_in_place)
        finally:
            gradients.in_place.clear()  # they are the model's again, which may free them
        return averaged.loss, bool(averaged.overflowed)

    def paused(self) -> AbstractContextManager[object]:
        """Return a block in which backward passes only accumulate gradients, and none are sent."""
        return nullcontext() if self._overlap is None else self._overlap.paused()

    def enter_join(self) -> AbstractContextManager[object]:
        """Return a block in which ranks have unequal numbers of batches, so that none sends before its step."""
        if self._overlap is not None:
            self._overlap.abandon()
        return self.paused()

    def begin_step(self) -> None:
        """Let the next backward pass send gradients again, because the step is over."""
        if self._overlap is not None:
            self._overlap.begin_step(self.passes)

    def _follow_buckets(self) -> None:
        """Let the backward pass fill the buckets of the base algorithm, which is replaced when layouts change."""
        buckets = self._current_buckets()
        if buckets is None:
            self._overlap = None
        elif self._overlap is None or self._overlap.buckets is not buckets:
            gradients = self._model.flat_gradients
            self._overlap = OverlapHooks(gradients.parameters, gradients.views, buckets, self._current_buckets)
            self._overlap.begin_step(self.passes)

    def _current_buckets(self) -> Buckets | None:
        return self._replica.base.overlap.buckets
