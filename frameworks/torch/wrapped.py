"""The attributes of a ``torch.optim.Optimizer`` that wraps another one, apart from ``step``."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils.hooks import RemovableHandle

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.replica import Replica
from lentando.torch.convert import to_plain, to_torch
from lentando.torch.inner_optimizers import inner_states, load_with_inner

__all__ = ["WrappedOptimizer"]

INNER = "lentando inner optimizers"
"""Key in a state dict for the states of optimizers that the base optimizer holds, where its own state lacks them."""
MODES = ("train", "eval")
"""Methods of optimizers whose weights differ between training and evaluation (schedulefree)."""

Hooks = OrderedDict[int, Callable[..., Any]]


class WrappedOptimizer(torch.optim.Optimizer):
    """Forwards the public attributes of ``torch.optim.Optimizer`` to the base optimizer.

    Subclasses define ``step``, and the replica, whose state is a part of the state dict.

    Args:
        optimizer: the base optimizer.
    """

    _replica: Replica

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # super().__init__() is not called: it would make a second list of parameter groups, and put a second profiler
        # scope around step(), which costs more than everything that step() does between outer steps.
        self._base_optimizer = optimizer
        self._hooks: dict[str, Hooks] = {
            when: OrderedDict() for when in ("before state_dict", "after state_dict", "before load", "after load")
        }

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The base optimizer, which this one wraps."""
        return self._base_optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The list of the base optimizer itself. A list that is assigned becomes the base optimizer's."""
        return self._base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
            raise ConfigurationError(
                "param_groups must be a list of dicts, each with an entry 'params', as in a torch.optim.Optimizer, got "
                f"{type(groups).__name__}"
            )
        self._base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the base optimizer itself. A state that is assigned becomes the base optimizer's."""
        return self._base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self._base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The dict of default hyperparameters of the base optimizer itself."""
        return self._base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._base_optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        self._base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer, with the values of rank 0 on all ranks.

        Collective: every rank calls it between the same two steps.

        Raises:
            MismatchError: on every rank, if the ranks add different groups or are not about to do the same thing.
        """
        self._base_optimizer.add_param_group(param_group)
        self._replica.follow_changes()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict with one more entry, ``"lentando"``, for the state of the replica.

        If the base optimizer holds other optimizers (SAM, a list of optimizers) whose state its own state dict lacks,
        their states are in a further entry. Each rank has a state of its own (slow momentum is sharded, momenta are
        local) and saves it itself. Only if each step averages gradients, and there are no outer steps, any rank's will
        do for all ranks of a job of any size. ``torch.load(..., weights_only=True)`` reads it.
        """
        self._run_hooks("before state_dict")
        packed = self._base_optimizer.state_dict()
        state = {**packed, "lentando": to_torch(self._replica.state_dict())}
        if inner := inner_states(self._base_optimizer, packed):
            state[INNER] = inner
        return self._replaced_by_hooks("after state_dict", state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a ``state_dict()``, bit-identically once the state of the model has been loaded too.

        Where any rank's state will do, so will that of a plain optimizer, or of Horovod's; counts of steps remain.

        Raises:
            ConfigurationError: if the state belongs to another rank, model, method or world size.
        """
        state_dict = self._replaced_by_hooks("before load", state_dict.copy())
        if "lentando" in state_dict:
            self._replica.load_state_dict(to_plain(state_dict["lentando"]))
        elif self._replica.state_is_of_one_rank:
            raise ConfigurationError(
                "this state dict has no entry 'lentando': it was not made by a DistributedOptimizer. To start from the "
                "state of a plain optimizer, load it into that optimizer before wrapping it"
            )
        base = {key: value for key, value in state_dict.items() if key not in ("lentando", INNER)}
        load_with_inner(self._base_optimizer, base, state_dict.get(INNER, {}))
        self._run_hooks("after load")

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Register a hook that is called before each step of the base optimizer."""
        return self._base_optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Register a hook that is called after each step of the base optimizer, and before the outer step."""
        return self._base_optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register ``hook(optimizer)``, which is called before ``state_dict()``."""
        return self._register("before state_dict", hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register ``hook(optimizer, state_dict)``, which is called after ``state_dict()``.

        The hook may return another state dict.
        """
        return self._register("after state_dict", hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register ``hook(optimizer, state_dict)``, which is called before ``load_state_dict()``.

        The hook is passed a shallow copy of the state, and may return another state to be loaded.
        """
        return self._register("before load", hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register ``hook(optimizer)``, which is called after ``load_state_dict()``."""
        return self._register("after load", hook, prepend)

    def _register(self, when: str, hook: Callable[..., Any], prepend: bool) -> RemovableHandle:
        hooks = self._hooks[when]
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        if prepend:
            hooks.move_to_end(handle.id, last=False)
        return handle

    def _run_hooks(self, when: str) -> None:
        for hook in tuple(self._hooks[when].values()):
            hook(self)

    def _replaced_by_hooks(self, when: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        for hook in tuple(self._hooks[when].values()):
            replacement = hook(self, state_dict)
            if replacement is not None:
                state_dict = replacement
        return state_dict

    def __getattr__(self, name: str) -> Any:
        """Look up the methods ``train`` and ``eval`` of the base optimizer, which not every optimizer has."""
        if name in MODES and callable(method := getattr(self.__dict__.get("_base_optimizer"), name, None)):
            return lambda: self._set_mode(method, name)
        advice = ""
        if hasattr(self.__dict__.get("_base_optimizer"), name):
            advice = f": the optimizer that it wraps has one, optimizer.base_optimizer.{name}"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{advice}")

    def _set_mode(self, method: Callable[[], Any], name: str) -> Any:
        """Call the method ``train`` or ``eval`` of the base optimizer, which changes the weights."""
        with self._replica.weights_changed_by(f"{name}()"):
            return method()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse ``copy.copy``, ``copy.deepcopy`` and pickling, also of a scheduler that holds this optimizer.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"a {type(self).__name__} cannot be copied or pickled, nor can a scheduler that holds it: it is bound to "
            "the ranks of this job and to the memory of its model. To save it, use lt.save, or state_dict() of the "
            "optimizer and of the scheduler; to copy the model with its optimizer, use copy.deepcopy((model, "
            "optimizer.base_optimizer))"
        )

    def __setstate__(self, state: Any) -> NoReturn:
        """Refuse to restore a wrapper that was pickled by other means.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(f"a {type(self).__name__} cannot be unpickled: make a new one, and load a state dict")
