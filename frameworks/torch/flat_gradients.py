"""Flat tensors that hold the gradients of a PyTorch model while they are averaged."""

from collections.abc import Mapping, Sequence

import torch

from lentando.optimizers.rules.gradient_layout import FlatGradients, gradient_layouts
from lentando.torch.flat_memory import FlatMemory
from lentando.torch.local_tensors import copy_into, dense_gradient, set_gradient

__all__ = ["TorchGradients"]


class TorchGradients(FlatGradients):
    """The gradients of all parameters, and for each parameter whether it has one.

    Args:
        parameters: the trainable parameters by name.
        memory: flat memory of the parameters, one for each dtype.

    Attributes:
        parameters: as given.
        memory: flat memory of the gradients, one for each dtype.
        views: the part of the flat memory for the gradient of each parameter, by name: tensors of the parameter's
            shape, each with a storage of its own.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], memory: Sequence[FlatMemory]) -> None:
        self.parameters = parameters
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
        self.put({name: dense_gradient(name, self.parameters[name]) for name in self.views}, are_copied=are_copied)
        for memory in self.memory:
            memory.load()

    def scatter(self) -> None:
        """Give the averaged gradients to the model, as tensors over the flat memory."""
        for memory in self.memory:
            memory.store()
        for name, view in self.taken().items():
            set_gradient(self.parameters[name], view)

    def copy(self, view: torch.Tensor, values: torch.Tensor) -> None:
        """Copy values into a part of the flat memory, unless it holds them already."""
        copy_into(view, values)

    def new(self, values: Sequence[bool], like: torch.Tensor) -> torch.Tensor:
        """Make a tensor of numbers, of the dtype of ``like``."""
        return torch.tensor(values, dtype=like.dtype)
