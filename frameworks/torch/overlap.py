"""PyTorch's hooks that fill the buckets of gradients while the backward pass computes others."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import ref

import torch

from lentando.optimizers.rules.gradient_buckets import BucketCoverage, Buckets
from lentando.torch.local_tensors import copy_into, dense_gradient, is_same_memory

__all__ = ["OverlapHooks"]


class OverlapHooks:
    """Copies each gradient into the flat gradients when a backward pass has accumulated it, so that its bucket starts.

    The tensors in ``grad`` remain the model's until the optimizer takes the means over. By comparing them with the flat
    gradients, a step detects what was done to them in between.

    Args:
        parameters: parameters by name.
        views: flat gradients by name, each a view of the parameter's shape.
        buckets: buckets of the base algorithm.
        current: returns the buckets that are in use, which are others, or none, after a change of the model and if
            overlap is given up.

    Attributes:
        buckets: as given.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        views: Mapping[str, torch.Tensor],
        buckets: Buckets,
        current: Callable[[], Buckets | None],
    ) -> None:
        self.buckets = buckets
        self._current = current
        self._parameters = parameters
        self._views = views
        self._is_paused = False
        self._is_finished = False
        self._passes_left: dict[str, int] = {}
        hooks = ref(self)
        for name, parameter in parameters.items():
            _attach(parameter, name, hooks)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let backward passes inside the block only accumulate gradients."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def accumulated(self, name: str) -> None:
        """Copy the gradient of this parameter, to which a backward pass has added."""
        buckets, view = self.buckets, self._views[name]
        if self._is_paused or self._is_finished or self._current() is not buckets or not buckets.is_open(name):
            return  # ``finish`` detects what is added to a gradient whose bucket has been started
        self._passes_left[name] -= 1
        if self._passes_left[name] > 0:
            return
        gradient = self._dense(name)
        # A gradient that was zeroed in place is the flat gradient itself, in which later changes could not be detected.
        if gradient is not None and not is_same_memory(gradient, view):
            copy_into(view, gradient)
            buckets.filled(name)

    def finish(self) -> bool:
        """Start the remaining buckets, now that all gradients of a step are computed, and set the buckets' coverage.

        Returns:
            Whether the flat gradients are up to date, because no gradient was changed after its bucket was started.
        """
        buckets, coverage = self.buckets, BucketCoverage.ALL
        for name, parameter in self._parameters.items():
            gradient, view = self._dense(name), self._views[name]
            if gradient is None and parameter.grad is not None:
                coverage = BucketCoverage.UNSUPPORTED
            elif not buckets.is_open(name):
                if gradient is None or is_same_memory(gradient, view) or not torch.equal(gradient, view):
                    coverage = min(coverage, BucketCoverage.NONE)
            elif gradient is None:
                view.zero_()
                coverage = min(coverage, BucketCoverage.ALL_PRESENT)
            else:
                copy_into(view, gradient)
        buckets.start_all()
        buckets.coverage = coverage
        self._is_finished = True
        return coverage > BucketCoverage.NONE

    def abandon(self) -> None:
        """Let all ranks complete, at the next average, the buckets of a step that is not taken."""
        if self.buckets.is_in_flight:
            self.buckets.coverage = BucketCoverage.ABANDONED

    def begin_step(self, passes: int = 1) -> None:
        """Let the next backward passes fill the buckets again, because the step is over.

        Args:
            passes: number of backward passes in a step, of which all but the last only accumulate gradients.
        """
        self._is_finished = False
        self._passes_left = dict.fromkeys(self._parameters, passes)

    def _dense(self, name: str) -> torch.Tensor | None:
        """Return the gradient that a bucket can hold, None for a sparse one if buckets were chosen automatically."""
        gradient = self._parameters[name].grad
        if gradient is not None and gradient.is_sparse and self.buckets.is_automatic:
            return None
        return dense_gradient(name, self._parameters[name])


def _attach(parameter: torch.Tensor, name: str, hooks: "ref[OverlapHooks]") -> None:
    """Register a hook that does not keep the optimizer alive, which may be deleted before the model is."""

    def hook(_: torch.Tensor) -> None:
        alive = hooks()
        if alive is None:
            handle.remove()
        else:
            alive.accumulated(name)

    handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
