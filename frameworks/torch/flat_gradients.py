"""Flat tensors that hold the gradients of a PyTorch model while they are averaged."""

from collections.abc import Mapping, Sequence, Set
from typing import TypeVar, cast

import torch

from lentando.comm.transport import Array
from lentando.optimizers.rules.gradient_layout import FlatGradients, gradient_layouts
from lentando.torch.flat_memory import FlatMemory
from lentando.torch.large_gradients import LargeGradients
from lentando.torch.local_tensors import (
    address,
    addresses,
    any_sparse,
    copy_into,
    copy_together,
    set_gradient,
    set_gradients,
)

__all__ = ["TorchGradients"]

T = TypeVar("T")


class TorchGradients(FlatGradients):
    """The gradients of all parameters, and for each parameter whether it has one.

    Sparse gradients are noted and left out, or made dense.

    Args:
        parameters: the trainable parameters by name.
        memory: flat memory of the parameters, one for each dtype.
        sparse_as_dense: whether sparse gradients are averaged like dense ones.

    Attributes:
        parameters: as given.
        memory: flat memory of the gradients, one for each dtype.
        views: the part of the flat memory for the gradient of each parameter, by name: tensors of the parameter's
            shape, each with a storage of its own.
        in_place: large gradients that have stayed where the backward pass has put them, by number, while they are
            averaged.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], memory: Sequence[FlatMemory], sparse_as_dense: bool = False
    ) -> None:
        self.parameters = parameters
        self._sparse_as_dense = sparse_as_dense
        device, placement, shared = memory[0].device, memory[0].placement, memory[0].shared
        layouts = gradient_layouts(of_dtype.layout for of_dtype in memory)
        self.memory = [FlatMemory(layout, device, placement, shared) for layout in layouts]
        views = {
            entry.name: of_dtype.tensor(number, parameters[entry.name])
            for of_dtype in self.memory
            for number, entry in enumerate(of_dtype.layout.entries[:-1])
        }
        presence = [of_dtype.view(len(of_dtype.layout.entries) - 1, of_dtype.flat) for of_dtype in self.memory]
        super().__init__(layouts, views, presence)
        self._trained = [parameters[name] for name in views]
        self._homes = list(views.values())
        self._presence = presence
        self._addresses = addresses(self._homes)
        self._large = LargeGradients(self.memory, self._homes, memory)
        self.in_place: dict[int, Array] = {}
        self._addresses_in_use = frozenset(self._addresses) - {0}  # of parameters without elements

    def gather(self, are_copied: bool = False, in_place: bool = False) -> None:
        """Copy the gradients of the model into the flat memory, with a note of which parameters have one.

        Args:
            are_copied: whether the flat memory already holds the gradients, so that only the note is written.
            in_place: whether large gradients may stay where the backward pass has put them, so that ``parts`` has them.
        """
        given = [parameter.grad for parameter in self._trained]
        self.in_place = self._large.found_in(given) if in_place else {}
        missing = {number for number, gradient in enumerate(given) if gradient is None}
        if not any_sparse(given) and (are_copied or self._copy_together(given, missing)):
            self._note(missing)
        else:
            self._put_one_by_one(dict(zip(self.views, given, strict=True)), are_copied)
        for memory in self.memory:
            memory.load()

    @property
    def names_in_place(self) -> set[str]:
        """Names of the parameters whose gradients have stayed where the backward pass has put them."""
        names = list(self.views)
        return {names[number] for number in self.in_place}

    def parts(self) -> list[list[Array]]:
        """Arrays that hold the gradients, one after the other, for each flat memory: parts of it, and large ones."""
        return self._large.parts(self.in_place)

    def scatter(self) -> list[str]:
        """Give the averaged gradients to the model, as tensors over the flat memory.

        Returns:
            Names of the parameters whose gradients are sparse on some rank, which remain to be averaged.
        """
        for memory in self.memory:
            memory.store()
        if all(bool((presence > 0).all()) for presence in self._presence):
            stays = self.in_place.keys()
            set_gradients(_without(self._trained, stays), _without(self._homes, stays))
            return []
        sparse = self.sparse()
        for number, (name, view) in enumerate(self.taken().items()):
            if number in self.in_place:
                continue
            if name not in sparse:
                set_gradient(self.parameters[name], view)
            elif self._sparse_as_dense:
                set_gradient(self.parameters[name], self.views[name].to_sparse(min(1, self.views[name].dim())))
        return [] if self._sparse_as_dense else sparse

    def _copy_together(self, given: Sequence[torch.Tensor | None], missing: Set[int]) -> bool:
        """Copy gradients by one operation.

        Args:
            given: gradient of each parameter, dense or None.
            missing: numbers of those that are None.

        Returns:
            False, and nothing is copied, if some gradients lie in the flat memory, and others do not.
        """
        found = addresses(_without(given, missing))
        if found == _without(self._addresses, missing):
            return True
        if not self._addresses_in_use.isdisjoint(found):
            return False
        others = missing | self.in_place.keys()
        copy_together(_without(self._homes, others), _without(given, others))
        return True

    def _note(self, missing: Set[int]) -> None:
        """Note which parameters have a gradient: all but the missing ones, which count as zeros."""
        first = 0
        for presence in self._presence:
            presence.fill_(1)
            if absent := [number - first for number in missing if first <= number < first + presence.numel()]:
                presence[absent] = 0
            first += presence.numel()
        if missing:
            torch._foreach_zero_([self._homes[number] for number in missing])

    def _put_one_by_one(self, gradients: dict[str, torch.Tensor | None], are_copied: bool) -> None:
        gradients |= {name: self.views[name] for name in self.names_in_place}  # so that nothing is copied
        for name, each in gradients.items():
            place = 0 if each is None else address(each)
            if each is not None and place in self._addresses_in_use and place != address(self.views[name]):
                gradients[name] = each.detach().clone()  # before its place, that of another gradient, is overwritten
        sparse = {name: each for name, each in gradients.items() if each is not None and each.is_sparse}
        gradients |= {name: each.to_dense() if self._sparse_as_dense else None for name, each in sparse.items()}
        self.put(gradients, are_copied=are_copied, sparse=sparse)

    def copy(self, view: torch.Tensor, values: torch.Tensor) -> None:
        """Copy values into a part of the flat memory, unless it holds them already."""
        copy_into(view, values)

    def new(self, values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        """Make a tensor of numbers, of the dtype of ``like``."""
        return torch.tensor(values, dtype=like.dtype)


def _without(values: Sequence[T | None], numbers: Set[int]) -> list[T]:
    """Values without those of some numbers, which include all that are None."""
    kept = values if not numbers else [value for number, value in enumerate(values) if number not in numbers]
    return cast(list[T], kept)
