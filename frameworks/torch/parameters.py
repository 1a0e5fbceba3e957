"""The parameters of a PyTorch optimizer: their names, their groups, and which of them are trained."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from weakref import WeakSet

import torch

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.model_argument import not_by_name

__all__ = ["Parameters", "checked_named_parameters"]

_requires_grad = attrgetter("requires_grad")
_wrapped: "WeakSet[Parameters]" = WeakSet()
"""The parameters of all wrapped optimizers of this process, because several may train parts of one model."""


@dataclass(frozen=True)
class _Group:
    """The parameters of a group when it was last read, and whether each required a gradient."""

    parameters: Sequence[torch.Tensor]
    are_trainable: Sequence[bool]


class Parameters:
    """The parameters of one optimizer, with their names.

    Args:
        optimizer: base optimizer.
        model: model that provides the names.
        named_parameters: pairs of name and parameter, used if there is no ``model``.

    Attributes:
        trainable: parameters that require gradients, by name, in the order of the parameter groups.
        frozen: the optimizer's other parameters, by name.
        group_of: number of the parameter group of each parameter, trainable or frozen, by name.

    Raises:
        ConfigurationError: if two parameters have the same name, or ``model`` has none of the parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | None,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
    ) -> None:
        self._optimizer = optimizer
        self._model = model
        self._names = {parameter: name for name, parameter in named_parameters or ()} if model is None else {}
        self.read()
        if model is not None and set(self).isdisjoint(model.parameters()):
            raise ConfigurationError(
                "the model given as model= has none of the optimizer's parameters: pass the model that this optimizer "
                "trains, or no model"
            )
        _wrapped.add(self)

    def read(self) -> None:
        """Read the present parameters from the optimizer, and which of them are trainable."""
        self.trainable, self.frozen, self.group_of = self.found()
        self._seen = [
            _Group(list(group["params"]), list(map(_requires_grad, group["params"])))
            for group in self._optimizer.param_groups
        ]

    def have_changed(self) -> bool:
        """Return whether parameters were frozen, unfrozen, added or removed since ``read``. Takes 0.1 us for each."""
        groups = self._optimizer.param_groups
        if len(groups) != len(self._seen):
            return True
        for group, seen in zip(groups, self._seen, strict=True):
            parameters = group["params"]
            if len(parameters) != len(seen.parameters) or not all(map(is_, parameters, seen.parameters)):
                return True
            if list(map(_requires_grad, parameters)) != seen.are_trainable:
                return True
        return False

    def found(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, int]]:
        """Return the present ``trainable``, ``frozen`` and ``group_of`` without storing them."""
        if self._model is not None:
            for name, parameter in self._model.named_parameters():
                self._names.setdefault(parameter, name)
        trainable: dict[str, torch.Tensor] = {}
        frozen: dict[str, torch.Tensor] = {}
        group_of: dict[str, int] = {}
        twice: set[str] = set()
        for group_number, group in enumerate(self._optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                # A parameter keeps its name when the groups or the model change.
                name = self._names.setdefault(parameter, f"group{group_number}.parameter{number}")
                if name in group_of:
                    twice.add(name)
                group_of[name] = group_number
                (trainable if parameter.requires_grad else frozen)[name] = parameter
        if twice:
            raise ConfigurationError(f"names of parameters must be unique, got {sorted(twice)} more than once")
        return trainable, frozen, group_of

    def replaced(self) -> set[str]:
        """Return the names that belong to other parameters than when ``read`` was last called."""
        trainable, frozen, _ = self.found()
        before, now = self.trainable | self.frozen, trainable | frozen
        return {name for name, parameter in now.items() if before.get(name, parameter) is not parameter}

    def left_out(self) -> list[str]:
        """Return the names of the model's trainable parameters that no wrapped optimizer of this process trains."""
        if self._model is None:
            return []
        taken = {parameter for others in _wrapped for parameter in others}
        named = self._model.named_parameters()
        return [name for name, parameter in named if parameter.requires_grad and parameter not in taken]

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield all of the optimizer's parameters, trainable ones first."""
        yield from self.trainable.values()
        yield from self.frozen.values()


def checked_named_parameters(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]]
) -> list[tuple[str, torch.Tensor]]:
    """Return the names of parameters that a program passes in place of a model, as a list.

    Args:
        optimizer: the optimizer whose parameters they should be.
        named_parameters: pairs of name and parameter.

    Raises:
        ConfigurationError: if there are other things than pairs, if two have the same name, or if the optimizer has
            parameters without a name.
    """
    expected = "pairs of name and parameter, as of model.named_parameters()"
    if isinstance(named_parameters, torch.nn.Module) or not isinstance(named_parameters, Iterable):
        raise not_by_name("named_parameters", expected, named_parameters)
    named_parameters = list(named_parameters)
    for pair in named_parameters:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ConfigurationError(f"named_parameters must be {expected}, got {pair!r}")
    names = [name for name, _ in named_parameters]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ConfigurationError(f"names of parameters must be unique, got {twice} more than once")
    named = {id(parameter) for _, parameter in named_parameters}
    missing = [
        f"{number} of group {group_number}"
        for group_number, group in enumerate(optimizer.param_groups)
        for number, parameter in enumerate(group["params"])
        if id(parameter) not in named
    ]
    if missing:
        raise ConfigurationError(
            f"named_parameters lacks parameters of the optimizer, by number: {', '.join(missing[:8])}. Name all of "
            "them, or none"
        )
    return named_parameters
