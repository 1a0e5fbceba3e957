"""State that a program commits, and continues from after ranks of an elastic job have died; Horovod's interface.

A framework adds the state of its models and optimizers (``lentando.torch.elastic``, ``lentando.tensorflow.elastic``).
"""

import copy
import logging
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from lentando.comm import operations
from lentando.comm.elastic import deaths_raised, is_elastic
from lentando.comm.errors import HostsUpdatedInterrupt, RankLostError
from lentando.comm.world import rank, transport

__all__ = ["ObjectState", "State", "run_fn"]

_log = logging.getLogger("lentando")

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="State")


class State:
    """State that is saved in memory, restored after ranks have died, and made equal on all ranks.

    Subclasses implement ``save``, ``restore`` and ``sync``.

    Args:
        bcast_object: function that returns rank 0's object on every rank.
        get_rank: function that returns the number of this rank.
    """

    def __init__(
        self, bcast_object: Callable[[Any], Any] | None = None, get_rank: Callable[[], int] | None = None
    ) -> None:
        self._bcast_object: Callable[[Any], Any] = bcast_object or operations.broadcast_object
        self._rank = get_rank or rank
        self._reset_callbacks: list[Callable[[], object]] = []

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], object]]) -> None:
        """Register functions that ``run`` calls after ranks have died, before the state is synchronized.

        They adapt the program to the present ``size()``: the learning rate, the share of the data.

        Args:
            callbacks: functions without arguments, called in this order.
        """
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Call ``reset`` and the registered functions."""
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def commit(self) -> None:
        """Save the state, for ``restore``. It copies all of it, so that every few steps may be often enough."""
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Do nothing: no host can join a job of Lentando, and ranks that die are noticed by every collective."""

    def save(self) -> None:
        """Save the state in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Return to the state that was saved last."""
        raise NotImplementedError

    def sync(self) -> None:
        """Make rank 0's state that of every rank, and save it. Collective."""
        raise NotImplementedError

    def reset(self) -> None:
        """Adapt the object to the present ranks; called after ranks have died, before ``sync``."""


class ObjectState(State):
    """State of Python objects, which are attributes of this object.

    Args:
        bcast_object: function that returns rank 0's object on every rank; ``broadcast_object`` by default.
        get_rank: function that returns the number of this rank; ``rank`` by default.
        **kwargs: initial value of each attribute. Values are of the types that ``broadcast_object`` sends (numbers,
            strings, arrays, and containers of them); ``save`` copies them.

    Raises:
        ConfigurationError: in ``sync``, on every rank, if a value cannot be sent.

    Example:
        >>> state = ObjectState(epoch=0, losses=[])
        >>> state.epoch, _ = 1, state.losses.append(0.5)
        >>> state.restore()
        >>> state.epoch, state.losses
        (0, [])
    """

    def __init__(
        self,
        bcast_object: Callable[[Any], Any] | None = None,
        get_rank: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(bcast_object, get_rank)
        self._names = list(kwargs)
        self._saved: dict[str, Any] = {}
        self._set(kwargs)
        ObjectState.save(self)

    def save(self) -> None:
        """Save a copy of each attribute."""
        self._saved = copy.deepcopy({name: getattr(self, name) for name in self._names})

    def restore(self) -> None:
        """Set each attribute to a copy of the value that was saved last."""
        self._set(copy.deepcopy(self._saved))

    def sync(self) -> None:
        """Set each attribute to rank 0's present value, and save it. Collective."""
        if self._names:
            self._set(self._bcast_object({name: getattr(self, name) for name in self._names}))
            ObjectState.save(self)

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def run_fn(
    func: Callable[Concatenate[S, P], R], reset: Callable[[], object] | None = None
) -> Callable[Concatenate[S, P], R]:
    """Call a training function again, from the state that was committed last, as often as ranks die meanwhile.

    Before every call, the state is synchronized from rank 0. When a rank dies (in a job with ``init(elastic=True)``),
    the collective in which the others notice it raises ``RankLostError`` on all of them. The state is then restored to
    its last commit, the callbacks of ``register_reset_callbacks`` are called, and the function begins again on the
    survivors, with their present ``rank()`` and ``size()``. In a job that is not elastic, the job ends with the rank.

    Unlike in Horovod, no worker can join: a job that has lost ranks continues with fewer.

    Args:
        func: function whose first argument is the ``State``. It must not catch ``RankLostError``.
        reset: function that is called before the state's callbacks.

    Returns:
        The function to be called in its place. Collective.
    """

    @wraps(func)
    def called(state: S, /, *arguments: P.args, **options: P.kwargs) -> R:
        world = transport()
        is_rolled_back, is_interrupted, is_synchronized = False, False, False
        with deaths_raised(world):
            while True:
                try:
                    if is_rolled_back:
                        state.restore()
                    if is_rolled_back or is_interrupted:
                        if reset is not None:
                            reset()
                        state.on_reset()
                    if not is_synchronized:
                        state.sync()
                    result = func(state, *arguments, **options)
                    if is_elastic(world):
                        operations.barrier()  # a rank that dies before all have the result is noticed by all in here
                except RankLostError as error:  # noqa: PERF203 - the loop is about this error
                    _log.info("rank %d: %s", world.rank, error)
                    is_rolled_back, is_synchronized = True, False
                except HostsUpdatedInterrupt as interrupt:
                    is_rolled_back, is_interrupted, is_synchronized = False, True, interrupt.skip_sync
                else:
                    return result

    return called
