"""Calls of collectives on tensors: executed now, or in the background behind a handle."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Collective
from lentando.comm.world import transport
from lentando.optimizers.no_gradient import not_differentiable
from lentando.torch.convert import is_plain

__all__ = ["Handle", "TensorCall", "check_tensor", "check_tensors", "host_of", "poll", "synchronize"]

T = TypeVar("T")


class Waitable(Protocol):
    """What executes in the background."""

    def poll(self) -> bool:
        """Return whether it is complete."""

    def wait(self) -> Any:
        """Wait until it is complete, and return its result."""


class Handle(Generic[T]):
    """An asynchronous operation, as the functions ``..._async`` return it. It makes progress in the background.

    Args:
        operation: the operation on arrays.
        finish: turns its result into tensors, and moves them to their device.
    """

    def __init__(self, operation: Waitable, finish: Callable[[Any], T]) -> None:
        self._operation = operation
        self._finish: Callable[[Any], T] | None = finish
        self._result: T

    def poll(self) -> bool:
        """Return whether the operation is complete, so that ``wait`` returns at once.

        This does not wait, but for the second call over a backend that admits one thread only.
        """
        return self._finish is None or self._operation.poll()

    def wait(self) -> T:
        """Wait until the operation is complete, and return its result; further calls return the same result."""
        if self._finish is not None:
            self._result = self._finish(self._operation.wait())
            self._finish = None
        return self._result

    def __call__(self) -> T:
        """Wait and return the result, as a handle of Horovod's ``sparse_allreduce_async`` does when it is called."""
        return self.wait()


@dataclass(slots=True)
class TensorCall(Generic[T]):
    """One call of a collective on tensors.

    Attributes:
        collective: the call, on arrays in host memory.
        finish: turns its result into tensors, and moves them to their device.
    """

    collective: Collective[Any]
    finish: Callable[[Any], T]

    def run(self) -> T:
        """Execute the call on this thread, in the order of the program."""
        return self.finish(self.collective.run())

    def start(self) -> Handle[T]:
        """Execute the call in the background, once all ranks have submitted one of this name."""
        return Handle(self.collective.start(), self.finish)


def poll(handle: Handle[Any]) -> bool:
    """Return whether an asynchronous operation is complete, so that ``synchronize`` would not wait.

    This does not wait, but for the second call over a backend that admits one thread only.

    Args:
        handle: what a function ``..._async`` has returned.
    """
    return _checked(handle).poll()


def synchronize(handle: Handle[T]) -> T:
    """Wait for an asynchronous operation, and return its result.

    Args:
        handle: what a function ``..._async`` has returned.

    Raises:
        MismatchError: on every rank, if ranks have called different operations under this name, or if all ranks wait
            for operations that others have not submitted.
    """
    result: T = _checked(handle).wait()
    return result


def check_tensor(tensor: Any, function: str, *, is_in_place: bool = False, has_gradient: bool = False) -> None:
    """Check that a tensor can be sent, and that no gradient would be lost silently.

    Args:
        tensor: argument of a function.
        function: name of the function.
        is_in_place: whether it changes the tensor.
        has_gradient: whether it passes gradients on.

    Raises:
        ConfigurationError: for anything else.
    """
    if not isinstance(tensor, torch.Tensor):
        numbers = ", or a Python float, int or bool" if function == "allreduce" else ""
        raise ConfigurationError(f"{function} expects a torch.Tensor{numbers}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        kind = "on the meta device" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout)
        raise ConfigurationError(f"{function} expects a dense tensor that holds values, got one that is {kind}")
    if has_gradient or not (tensor.requires_grad and torch.is_grad_enabled()):
        return
    if is_in_place and tensor.is_leaf:  # the value of a parameter is set, which no gradient depends on
        return
    transport()  # raises NotInitializedError outside of a job, which is the more useful error
    base = function.removesuffix("_").removesuffix("_async")
    raise not_differentiable(
        f"{function} was given a tensor of shape {list(tensor.shape)} that requires a gradient",
        f"Call {base}, which has one, or pass tensor.detach(), or call it inside torch.no_grad(),",
    )


def check_tensors(
    tensors: Iterable[Any], function: str, *, is_in_place: bool = False, has_gradient: bool = False
) -> list[torch.Tensor]:
    """Check the tensors of a group as ``check_tensor`` does, and return them as a list.

    Args:
        tensors: argument of a function, which may be a generator.
        function: as for ``check_tensor``, like all arguments that follow.
        is_in_place: whether it changes the tensors.
        has_gradient: whether it passes gradients on.

    Raises:
        ConfigurationError: for anything else.
    """
    if not isinstance(tensors, Iterable):
        raise ConfigurationError(f"{function} expects tensors in a list, got {type(tensors).__name__}")
    listed = list(tensors)
    for tensor in listed:
        check_tensor(tensor, function, is_in_place=is_in_place, has_gradient=has_gradient)
    return listed


def host_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, contiguous in host memory: in the tensor's own memory where possible."""
    return tensor if is_plain(tensor) else tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()


def _checked(handle: Any) -> Handle[Any]:
    if not isinstance(handle, Handle):
        raise ConfigurationError(f"expected a handle, as a function ..._async returns it, got {type(handle).__name__}")
    return handle
