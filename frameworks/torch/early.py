"""Gradients on their way while the backward pass still computes others: PyTorch's hooks, which fill the buckets."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import ref

import torch

from lentando.optimizers.rules.base_algorithms import OverlappedGradients
from lentando.optimizers.rules.gradient_buckets import BucketCoverage
from lentando.torch.model import dense_gradient

__all__ = ["EarlyHooks"]


class EarlyHooks:
    """Copies each gradient into the flat ones when a backward pass has accumulated it, for its bucket to set out.

    What the model holds in ``grad`` stays its own until the optimizer takes over the means. By that the step sees what
    has been done to it meanwhile.

    Args:
        parameters: by name.
        homes: the flat gradients, as views, by name.
        early: the base algorithm.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], homes: Mapping[str, torch.Tensor], early: OverlappedGradients
    ) -> None:
        self._early = early
        self._parameters = parameters
        self._homes = homes
        self._is_paused = False
        self._is_finished = False
        own = ref(self)
        for name, parameter in parameters.items():
            _attach(parameter, name, own)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes inside only accumulate."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @property
    def is_in_flight(self) -> bool:
        """Whether gradients of a step that has not been taken are being averaged."""
        return self._early.buckets.is_in_flight

    def accumulated(self, name: str) -> None:
        """A backward pass has added to this parameter's gradient."""
        buckets, home = self._early.buckets, self._homes[name]
        if self._is_paused or self._is_finished or not buckets.is_open(name):
            return  # what is added to a gradient that has set out, ``finish`` sees
        gradient = dense_gradient(name, self._parameters[name])
        # One that was zeroed in place lies in the flat gradients itself, where nothing could be seen of later changes.
        if gradient is not None and gradient.data_ptr() != home.data_ptr():
            home.copy_(gradient)
            buckets.filled(name)

    def finish(self) -> bool:
        """The gradients of a step are there: start the buckets that have not, and say what all of them hold.

        Returns:
            Whether the flat gradients are up to date, for none that had set out was changed since.
        """
        buckets, coverage = self._early.buckets, BucketCoverage.ALL
        for name, parameter in self._parameters.items():
            gradient, home = dense_gradient(name, parameter), self._homes[name]
            if not buckets.is_open(name):
                if gradient is None or gradient.data_ptr() == home.data_ptr() or not torch.equal(gradient, home):
                    coverage = BucketCoverage.NONE
            elif gradient is None:
                home.zero_()
                coverage = min(coverage, BucketCoverage.ALL_PRESENT)
            elif gradient.data_ptr() != home.data_ptr():
                home.copy_(gradient)
        buckets.start_all()
        self._early.coverage = coverage
        self._is_finished = True
        return coverage is not BucketCoverage.NONE

    def restart(self) -> None:
        """The step is over."""
        self._is_finished = False


def _attach(parameter: torch.Tensor, name: str, hooks: "ref[EarlyHooks]") -> None:
    """The parameter must not keep the optimizer alive, which may be gone before the model is."""

    def hook(_: torch.Tensor) -> None:
        alive = hooks()
        if alive is None:
            handle.remove()
        else:
            alive.accumulated(name)

    handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
