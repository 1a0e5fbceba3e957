"""One call of a collective operation by the user, as an object."""

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar, cast

from lentando.comm import timeline
from lentando.comm.asynchronous import Handle, operations_of, tensor_name
from lentando.comm.checked_calls import CheckedCall
from lentando.comm.elastic import in_place
from lentando.comm.errors import ConfigurationError
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.summation import Summation
from lentando.comm.transport import Array, Transport

__all__ = ["Agree", "Collective", "check_in_place", "described", "refused", "refused_on_every_rank"]

P = ParamSpec("P")
R = TypeVar("R")
Agree = Callable[[], None]


class Collective(Generic[R]):
    """One call of a collective operation: what it is called, what must be equal on all ranks, and how it is executed.

    The arguments have been checked when it is made. It does not communicate before ``run``, and is executed once.

    Args:
        operation: name of the operation.
        arguments: what must be equal on all ranks, as JSON, such as shape, dtype and op.
        name: name that the user has given to the call.
        process_set: the participating ranks.
        execute: moves the data. It receives the transport, and a function that it calls once, before it sends
            anything: that compares the call between ranks, unless this has been done already.
        changes: the arrays that ``execute`` changes; apart from them it has only its result.
        summation: the same arrays and what happens to them, if the call is a sum or mean, which ``start`` may form
            together with others.
        description: operation and arguments as JSON, if the caller has it.

    Raises:
        ConfigurationError: if this rank is not a member of the process set.

    Example:
        >>> import numpy as np
        >>> from lentando.comm.operations import Sum, allreduce_call
        >>> from lentando.comm.transports.single import SingleTransport
        >>> from lentando.comm.world import simulated_rank
        >>> with simulated_rank(SingleTransport()):  # in a program: init()
        ...     array = np.ones(2)
        ...     call = allreduce_call(array, Sum, name="gradients")
        ...     call.run()
        >>> call.operation, call.arguments, call.name
        ('allreduce', [[2], 'float64', 'sum'], 'gradients')
    """

    def __init__(
        self,
        operation: str,
        arguments: list[Any],
        name: str | None,
        process_set: ProcessSet,
        execute: Callable[[Transport, Agree], R],
        changes: Sequence[Array] = (),
        summation: Summation | None = None,
        description: str | None = None,
    ) -> None:
        self.operation = operation
        self.arguments = arguments
        self.name = name
        self.process_set = process_set
        self.transport = transport_of(process_set)
        self._execute = execute
        self._changes = changes
        self.summation = summation
        self._description = description

    @property
    def description(self) -> str:
        """Operation and arguments as JSON."""
        if self._description is None:
            self._description = json.dumps([self.operation, *self.arguments])
        return self._description

    def execute(self, transport: Transport, agree: Agree = lambda: None) -> R:
        """Move the data over a transport of the members of the process set. Collective.

        Args:
            transport: the transport of the process set, or another one of the same ranks, such as that of a thread.
            agree: compares the call between ranks; by default they are known to make the same call.
        """
        return self._execute(transport, agree)

    def run(self) -> R:
        """Compare the call between ranks, execute it on this thread, and return its result. Collective.

        In an elastic job it is one transaction.

        Raises:
            MismatchError: on every rank of the process set, if ranks make different calls.
            ConfigurationError: on every rank, if the arguments cannot work on all of them.
        """
        transport = self.transport
        call = CheckedCall(transport, self.operation, self.arguments, self.name)
        agree = call.agree

        def run() -> R:
            try:
                return call.run(lambda: in_place(transport, self._changes, lambda: self.execute(transport, agree)))
            except ConfigurationError as error:
                error.is_of_begun_call = True
                raise

        recording = timeline.active
        if recording is None:
            return run()
        recording.mark_cycle()
        kind, tensor = self.operation.upper(), tensor_name(self)
        agree = timeline.recorded(f"NEGOTIATE_{kind}", agree, tensor=tensor)
        return timeline.recorded(kind, run, tensor=tensor, bytes=sum(array.nbytes for array in self._changes))()

    def start(self) -> Handle[R]:
        """Submit the call, and return a handle at once. It is executed while the program continues.

        Calls of different ranks are matched by their names, in whatever order ranks submit them; those without a name
        by their number among the rank's calls without a name. Arrays must not be read or changed before the handle is
        complete. Sums are formed in the order of the ranks, so that a sum of more than two numbers may differ from that
        of ``run`` in its last bits; it does not depend on which sums are formed together.

        Raises:
            ConfigurationError: if a call of the same operation and name is in flight on this rank, or the job is
                elastic.
        """
        try:
            return operations_of(self.transport).submit(self)
        except ConfigurationError as error:
            error.is_of_begun_call = True
            raise


def refused(
    operation: str, problem: str | ConfigurationError, name: str | None, process_set: ProcessSet
) -> Collective[Any]:
    """A call with arguments that cannot work, on this rank alone perhaps: an error on every rank when it is executed.

    Ranks without this problem make another call, so that all of them get a ``MismatchError``, which contains it.

    Args:
        operation: name of the operation.
        problem: description of what is wrong, as a noun phrase: ``splits that ...``; or the error, which is raised if
            all ranks have it.
        name: name that the user has given to the call.
        process_set: the participating ranks.
    """
    error = problem if isinstance(problem, ConfigurationError) else ConfigurationError(f"{operation} got {problem}")

    def execute(transport: Transport, agree: Agree) -> Any:
        agree()
        raise error

    found = problem if isinstance(problem, str) else f"arguments that are refused: {problem}"
    return Collective(operation, [found], name, process_set, execute)


def refused_on_every_rank(operation: str) -> Callable[[Callable[P, Collective[R]]], Callable[P, Collective[R]]]:
    """Decorate a function that makes a call: where it raises a ConfigurationError, it returns a refused call.

    Without this, a rank with arguments that cannot work would raise alone, and the others would wait for it.

    Args:
        operation: name of the operation.
    """

    def decorated(make: Callable[P, Collective[R]]) -> Callable[P, Collective[R]]:
        @wraps(make)
        def made(*args: P.args, **kwargs: P.kwargs) -> Collective[R]:
            try:
                return make(*args, **kwargs)
            except ConfigurationError as error:
                name = cast("str | None", kwargs.get("name"))
                return refused(operation, error, name, cast(ProcessSet, kwargs.get("process_set", global_process_set)))

        return made

    return decorated


def check_in_place(array: Array) -> None:
    """Check that an array can be changed in place: one that is not contiguous is changed in a copy, which is lost.

    Raises:
        ConfigurationError: if it is not contiguous.
    """
    if not array.flags.c_contiguous:
        raise ConfigurationError(
            f"the array of shape {list(array.shape)} is not C-contiguous, and cannot be changed in place: pass a copy, "
            "numpy.ascontiguousarray(array), and store the result"
        )


def described(array: Array) -> list[Any]:
    """Shape and dtype of an array, as JSON."""
    return [list(array.shape), array.dtype.name]
