"""Arguments that a function of tensors refuses on one rank alone are an error on every rank."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import refused
from lentando.comm.process_sets import global_process_set
from lentando.torch.functions.calls import TensorCall

__all__ = ["refused_on_every_rank"]

P = ParamSpec("P")
T = TypeVar("T")


def refused_on_every_rank(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function of tensors such that the other ranks do not wait for one that refuses its arguments.

    Such a rank makes a call that no other rank makes, so that all of them get a ``MismatchError`` with the reason. If
    all ranks refuse their arguments for the same reason, each raises the original error. In a function ``..._async``
    such a rank waits until the others have submitted their call, and raises the error at once.

    Args:
        function: function of tensors, with the arguments ``name`` and ``process_set``.
    """
    operation = function.__name__.removesuffix("_").removesuffix("_async")  # the name under which the others make it
    signature = inspect.signature(function)
    is_async = "_async" in function.__name__

    @wraps(function)
    def refusing(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ConfigurationError as error:
            if error.is_of_begun_call:
                raise
            given = signature.bind(*args, **kwargs).arguments
            process_set = given.get("process_set", global_process_set)
            call: TensorCall[Any] = TensorCall(
                refused(operation, error, given.get("name"), process_set), lambda _: None
            )
            return cast(T, call.start().wait() if is_async else call.run())

    return refusing
