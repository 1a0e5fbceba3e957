"""Gradients on their way while the backward pass still computes others: PyTorch's hooks, which fill the buckets."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import ref

import torch

from lentando.optimizers.base_algorithms import EarlyGradients
from lentando.optimizers.buckets import ALL, ALL_THERE_ARE, NONE
from lentando.torch.convert import as_tensor
from lentando.torch.model import dense, view_of

__all__ = ["EarlyHooks"]


class EarlyHooks:
    """Copies each gradient into its bucket when a backward pass has accumulated it.

    What the model holds in ``grad`` stays its own rank's until the optimizer takes over the means. What was done to a
    gradient after it was copied is seen by PyTorch's counter of changes in place, as its backward pass sees it.

    Args:
        parameters: by name.
        early: the base algorithm.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], early: EarlyGradients) -> None:
        self._early = early
        self._parameters = parameters
        self._homes: dict[str, torch.Tensor] = {}
        for buffer in early.buckets.memory:
            flat = as_tensor(buffer.array)
            for number, entry in enumerate(buffer.layout.entries[:-1]):
                self._homes[entry.name] = view_of(flat, buffer.layout, number, parameters[entry.name])
        self._copied: dict[str, tuple[torch.Tensor, int]] = {}
        self._accumulated_again = False
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
    def under_way(self) -> bool:
        """Whether gradients of a step that has not been taken are being averaged."""
        return self._early.buckets.under_way

    def accumulated(self, name: str) -> None:
        """A backward pass has added to this parameter's gradient."""
        if self._is_paused or self._is_finished:
            return
        buckets = self._early.buckets
        if not buckets.is_open(name):
            self._accumulated_again = True
            return
        self._copy(name)
        buckets.filled(name)

    def finish(self) -> None:
        """The gradients of a step are there: start what has not been, and say what the buckets hold."""
        buckets = self._early.buckets
        holds = NONE if self._accumulated_again else ALL
        for name, parameter in self._parameters.items():
            if buckets.is_open(name):
                if parameter.grad is None:
                    self._homes[name].zero_()
                    holds = min(holds, ALL_THERE_ARE)
                elif not self._is_as_copied(name):
                    self._copy(name)
            elif not self._is_as_copied(name):
                holds = NONE
        buckets.start_all()
        self._early.early = holds
        self._copied.clear()
        self._accumulated_again = False
        self._is_finished = True

    def restart(self) -> None:
        """The step is over."""
        self._is_finished = False

    def _copy(self, name: str) -> None:
        gradient = dense(self._parameters[name], name)
        self._homes[name].copy_(gradient)
        self._copied[name] = gradient, gradient._version

    def _is_as_copied(self, name: str) -> bool:
        copied, version = self._copied.get(name, (None, 0))
        return copied is not None and self._parameters[name].grad is copied and copied._version == version


def _attach(parameter: torch.Tensor, name: str, hooks: "ref[EarlyHooks]") -> None:
    """The parameter must not keep the optimizer alive, which may be gone before the model is."""

    def hook(_: torch.Tensor) -> None:
        alive = hooks()
        if alive is None:
            handle.remove()
        else:
            alive.accumulated(name)

    handle = parameter.register_post_accumulate_grad_hook(hook)
