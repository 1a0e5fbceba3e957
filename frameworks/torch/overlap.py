"""PyTorch's hooks that fill the buckets of gradients while the backward pass computes others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import eq
from weakref import ref

import torch

from lentando.optimizers.rules.gradient_buckets import BucketCoverage, Buckets
from lentando.torch.local_tensors import addresses, any_sparse, copy_together, dense_gradient

__all__ = ["OverlapHooks"]

TOGETHER_BYTES = 256 * 1024
"""Gradients are copied when so many bytes wait, which a cache still holds, or when their bucket is complete."""


class OverlapHooks:
    """Copies gradients into the flat gradients when a backward pass has accumulated them, so that buckets start.

    Small gradients are copied together, in a fraction of the time. The tensors in ``grad`` remain the model's until the
    optimizer takes the means over. By comparing them with the flat gradients, a step detects what was done to them in
    between.

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
        self._addresses = dict(zip(views, addresses(list(views.values())), strict=True))
        self._bytes = {name: view.nbytes for name, view in views.items()}
        self._waiting: list[str] = []
        self._waiting_bytes = 0
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
        """Note that a backward pass has added to the gradient of this parameter."""
        buckets = self.buckets
        if self._is_paused or self._is_finished or self._current() is not buckets or not buckets.is_open(name):
            return  # ``finish`` detects what is added to a gradient whose bucket has been started
        self._passes_left[name] -= 1
        if self._passes_left[name] > 0:
            return
        self._waiting.append(name)
        self._waiting_bytes += self._bytes[name]
        is_complete = buckets.note_final(name)
        if is_complete or self._waiting_bytes >= TOGETHER_BYTES:
            self._copy_waiting()
        if is_complete:
            buckets.start_full()

    def finish(self) -> bool:
        """Start the remaining buckets, now that all gradients of a step are computed, and set the buckets' coverage.

        Returns:
            Whether the flat gradients are up to date, because no gradient was changed after its bucket was started.
        """
        buckets, coverage = self.buckets, BucketCoverage.ALL
        self._forget_waiting()
        given = {name: parameter.grad for name, parameter in self._parameters.items()}
        dense = {name: self._dense(name) for name in given} if any_sparse(given.values()) else given
        if any(dense[name] is None and gradient is not None for name, gradient in given.items()):
            coverage = BucketCoverage.UNSUPPORTED
        is_open = {name: buckets.is_open(name) for name in dense}
        if not self._are_unchanged({name: gradient for name, gradient in dense.items() if not is_open[name]}):
            coverage = min(coverage, BucketCoverage.NONE)
        present = {name: gradient for name, gradient in dense.items() if is_open[name] and gradient is not None}
        self._copy(present)
        if missing := [self._views[name] for name in dense if is_open[name] and name not in present]:
            torch._foreach_zero_(missing)
            coverage = min(coverage, BucketCoverage.ALL_PRESENT)
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
        self._forget_waiting()
        self._passes_left = dict.fromkeys(self._parameters, passes)

    def _copy_waiting(self) -> None:
        """Copy the gradients that wait; those that cannot be copied keep their buckets from being started."""
        names, present = self._waiting, dict[str, torch.Tensor]()
        self._forget_waiting()
        for name in names:
            if (gradient := self._dense(name)) is not None:
                present[name] = gradient
        # A gradient that was zeroed in place is the flat gradient itself, in which later changes could not be detected.
        copied = self._copy(present)
        for name in names:
            if name not in copied:
                self.buckets.withdraw(name)

    def _forget_waiting(self) -> None:
        self._waiting, self._waiting_bytes = [], 0

    def _copy(self, gradients: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Copy gradients into the flat memory. Returns those that did not lie there."""
        are_home = self._lie_at_home(gradients)
        if any(are_home):
            pairs = zip(gradients.items(), are_home, strict=True)
            gradients = {name: gradient for (name, gradient), is_home in pairs if not is_home}
        copy_together([self._views[name] for name in gradients], list(gradients.values()))
        return gradients

    def _lie_at_home(self, gradients: Mapping[str, torch.Tensor]) -> Sequence[bool]:
        """Which gradients are those in the flat memory."""
        homes: Iterable[int] = map(self._addresses.__getitem__, gradients)
        return list(map(eq, addresses(list(gradients.values())), homes))

    def _are_unchanged(self, gradients: Mapping[str, torch.Tensor | None]) -> bool:
        """Whether gradients are still what was copied, as far as that can be seen."""
        present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        if len(present) < len(gradients) or any(self._lie_at_home(present)):
            return False
        return all(map(torch.equal, present.values(), map(self._views.__getitem__, present)))

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
