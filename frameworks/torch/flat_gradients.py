"""Flat tensors that hold the gradients of a PyTorch model while they are averaged."""

from collections.abc import Mapping, Sequence

import torch

from lentando.optimizers.rules.gradient_layout import FlatGradients, gradient_layouts
from lentando.torch.flat_memory import FlatMemory
from lentando.torch.local_tensors import address, copy_into, set_gradient

__all__ = ["TorchGradients"]


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

    def gather(self, are_copied: bool = False) -> None:
        """Copy the gradients of the model into the flat memory, with a note of which parameters have one.

        Args:
            are_copied: whether the flat memory already holds the gradients, so that only the note is written.
        """
        gradients = {name: self.parameters[name].grad for name in self.views}
        sparse = {name: given for name, given in gradients.items() if given is not None and given.is_sparse}
        gradients |= {name: given.to_dense() if self._sparse_as_dense else None for name, given in sparse.items()}
        if not are_copied:
            are_copied = all(_copy_together(memory, gradients) for memory in self.memory)
        self.put(gradients, are_copied=are_copied, sparse=sparse)
        for memory in self.memory:
            memory.load()

    def scatter(self) -> list[str]:
        """Give the averaged gradients to the model, as tensors over the flat memory.

        Returns:
            Names of the parameters whose gradients are sparse on some rank, which remain to be averaged.
        """
        for memory in self.memory:
            memory.store()
        sparse = self.sparse()
        for name, view in self.taken().items():
            if name not in sparse:
                set_gradient(self.parameters[name], view)
            elif self._sparse_as_dense:
                set_gradient(self.parameters[name], self.views[name].to_sparse(min(1, self.views[name].dim())))
        return [] if self._sparse_as_dense else sparse

    def copy(self, view: torch.Tensor, values: torch.Tensor) -> None:
        """Copy values into a part of the flat memory, unless it holds them already."""
        copy_into(view, values)

    def new(self, values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        """Make a tensor of numbers, of the dtype of ``like``."""
        return torch.tensor(values, dtype=like.dtype)


def _copy_together(memory: FlatMemory, gradients: Mapping[str, torch.Tensor | None]) -> bool:
    """Copy gradients into their flat memory by one operation, which takes a fraction of the time for small ones.

    Args:
        memory: flat memory of the gradients of one dtype.
        gradients: the gradients by name.

    Returns:
        False, and nothing is copied, if a gradient is missing, lies in flat memory or has another order of elements.
    """
    flat, parts = memory.flat, []
    start, end = address(flat), address(flat) + flat.nbytes
    for entry in memory.layout.entries[:-1]:
        gradient = gradients[entry.name]
        if gradient is None or entry.order != "C" or gradient.dtype != flat.dtype or not gradient.is_contiguous():
            return False
        if start <= address(gradient) < end or gradient.device != flat.device:
            return False
        parts.append(gradient.view(-1))
    with torch.no_grad():  # of gradients that have a graph, too (create_graph=True)
        torch.cat(parts, out=flat[: memory.layout.offsets[-1]])
    return True
