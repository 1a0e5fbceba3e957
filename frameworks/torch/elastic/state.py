"""The elastic state of a PyTorch program: models, optimizers, samplers and plain objects."""

import copy
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from lentando.optimizers.elastic_state import ObjectState
from lentando.optimizers.replica_optimizer import ReplicaOptimizer
from lentando.torch.functions import broadcast_object, broadcast_optimizer_state, broadcast_parameters
from lentando.torch.inner_optimizers import held_states, load_with_inner

__all__ = [
    "ModelStateHandler",
    "OptimizerStateHandler",
    "SamplerStateHandler",
    "StateHandler",
    "TorchState",
    "get_handler_registry",
    "set_handler_registry",
]


@runtime_checkable
class Stateful(Protocol):
    """An object with a state dict, such as a sampler, a learning-rate scheduler or a ``GradScaler``."""

    def state_dict(self) -> Any:
        """Return all that decides how the object continues."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Replace the state of the object."""


class StateHandler:
    """Saves, restores and synchronizes one attribute of a ``TorchState`` by its state dict.

    Args:
        value: the attribute.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.save()

    def save(self) -> None:
        """Copy the state in memory."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Return to the state that was saved last."""
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        """Load the state of rank 0. Collective."""
        self.value.load_state_dict(broadcast_object(self.value.state_dict(), 0, "elastic state"))

    def set_value(self, value: Any) -> None:
        """Handle another object from now on, and save its state.

        Args:
            value: the object.
        """
        self.value = value
        self.save()


class ModelStateHandler(StateHandler):
    """Handles a ``torch.nn.Module``."""

    def sync(self) -> None:
        """Fill the parameters and buffers with those of rank 0. Collective."""
        broadcast_parameters(self.value.state_dict(), root_rank=0)


class OptimizerStateHandler(StateHandler):
    """Handles a ``torch.optim.Optimizer``; of a ``DistributedOptimizer``, the base optimizer and the replica."""

    def save(self) -> None:
        """Copy the state in memory."""
        if isinstance(self.value, ReplicaOptimizer):
            self._replica = self.value.snapshot()
        base = _base(self.value)
        self._saved = copy.deepcopy((base.state_dict(), held_states(base)))

    def restore(self) -> None:
        """Return to the state that was saved last."""
        load_with_inner(_base(self.value), *copy.deepcopy(self._saved))
        if isinstance(self.value, ReplicaOptimizer):
            self.value.roll_back(self._replica)

    def sync(self) -> None:
        """Load the state of rank 0. Collective."""
        broadcast_optimizer_state(self.value, root_rank=0)
        if isinstance(self.value, ReplicaOptimizer):
            self.value.adopt_rank_0()


class SamplerStateHandler(StateHandler):
    """Handles an ``ElasticSampler``, or another object with ``state_dict`` and ``load_state_dict``."""


_registry: list[tuple[type, Callable[[Any], StateHandler]]] = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (Stateful, SamplerStateHandler),
]


def get_handler_registry() -> list[tuple[type, Callable[[Any], StateHandler]]]:
    """The classes of attributes that have a handler, with the handler; the first that fits is used."""
    return _registry


def set_handler_registry(registry: list[tuple[type, Callable[[Any], StateHandler]]]) -> None:
    """Replace the classes of attributes that have a handler.

    Args:
        registry: pairs of a class and a function that makes a handler for one of its objects.
    """
    _registry[:] = registry


class TorchState(ObjectState):
    """State of a PyTorch program, which ``run`` restores after ranks have died, and makes equal on all ranks.

    Modules and optimizers, and other objects with a state dict (``ElasticSampler``, learning-rate schedulers,
    ``GradScaler``), are saved by it. All other attributes are saved as objects; see ``ObjectState``. For a
    ``DistributedOptimizer`` of Lentando, the counts of its steps and its outer momentum are part of the state; gossip
    begins again from the restored weights.

    Args:
        model: the model.
        optimizer: the optimizer.
        **kwargs: further attributes: more models and optimizers, samplers, numbers, ...

    Example:
        >>> import torch, lentando.torch as lt
        >>> lt.init()
        >>> model = torch.nn.Linear(1, 1)
        >>> state = lt.elastic.TorchState(model=model, epoch=0)
        >>> before, state.epoch = model.bias.item(), 1
        >>> _ = torch.nn.init.constant_(model.bias, 5.0)
        >>> state.restore()
        >>> model.bias.item() == before, state.epoch
        (True, 0)
        >>> lt.shutdown()
    """

    def __init__(
        self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        values = {**kwargs, "model": model, "optimizer": optimizer}
        self._handlers: dict[str, StateHandler] = {}
        for name, value in values.items():
            handler = next((make(value) for kind, make in _registry if isinstance(value, kind)), None)
            if handler is not None:
                self._handlers[name] = handler
                super().__setattr__(name, value)
        super().__init__(broadcast_object, **{n: v for n, v in values.items() if n not in self._handlers})

    def save(self) -> None:
        """Save the state of all attributes in memory."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Return to the state that was saved last."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Make rank 0's present state that of every rank, and save it. Collective."""
        for handler in self._handlers.values():
            handler.sync()
            handler.save()
        super().sync()

    def __setattr__(self, name: str, value: Any) -> None:
        handler = vars(self).get("_handlers", {}).get(name)
        if handler is not None:
            handler.set_value(value)
        super().__setattr__(name, value)


def _base(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose state dict contains no state of a replica."""
    return optimizer.base_optimizer if isinstance(optimizer, ReplicaOptimizer) else optimizer  # type: ignore[attr-defined]
