"""Flat tensors that hold the parameters of a PyTorch model, and the buffers that are sent."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch.utils.dlpack import from_dlpack

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, FlatLayout
from lentando.torch.convert import as_array, as_device_array, as_tensor, dtype_name, share_stream
from lentando.torch.local_tensors import as_complex, as_real

__all__ = ["FlatMemory", "Placement", "device_of", "entry_of", "placement_on"]

Placement: TypeAlias = Literal["host", "staged", "device"]
"""``host``: CPU tensors, sent directly. ``staged``: GPU tensors, copied through host memory. ``device``: GPU tensors,
sent directly."""


class FlatMemory:
    """The flat tensor of one dtype on the model's device, and the buffer that is sent.

    Args:
        layout: layout of the flat tensor.
        device: device of the model.
        placement: where the flat tensor is, and whether it is sent directly.
        shared: whether the buffer is in memory that the other ranks of this node can read.

    Attributes:
        layout, device, placement, shared: as given.
        flat: the flat tensor, one-dimensional, on ``device``.
        buffer: the buffer that is sent: the same memory, or a copy of it in host memory for ``staged``.
    """

    def __init__(self, layout: FlatLayout, device: torch.device, placement: Placement, shared: bool) -> None:
        self.layout = layout
        self.device = device
        self.placement = placement
        self.shared = shared
        if placement == "device":
            self.flat = torch.zeros(layout.size, dtype=getattr(torch, layout.dtype.name), device=device)
            self.buffer = FlatBuffer(layout, as_device_array(self.flat))
            return
        self._host = as_tensor(FlatBuffer(layout, shared=shared).array)
        if device.type != "cpu":
            self._host = self._host.pin_memory()
        self.flat = torch.zeros_like(self._host, device=device) if placement == "staged" else self._host
        self.buffer = FlatBuffer(layout, as_array(self._host))

    def view(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Return a view of entry ``number`` with the shape and the memory order of ``like``."""
        start, entry = self.layout.offsets[number], self.layout.entries[number]
        flat = self.flat[start : start + entry.size]
        return flat.view(entry.shape) if entry.order == "C" else flat.as_strided(like.shape, like.stride())

    def tensor(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Return entry ``number`` as ``view`` does, but with a storage of its own over the same memory.

        The memory of the flat tensor is kept for as long as this tensor is in use.
        """
        start, entry = self.layout.offsets[number], self.layout.entries[number]
        # The storage of a view of the flat tensor would be the whole flat tensor. DLPack, on every device and for every
        # dtype, returns a tensor whose storage begins and ends where the entry does.
        part = from_dlpack(self.flat[start : start + entry.size])
        if like.is_complex():
            return as_complex(part.view(entry.shape))
        return part.view(entry.shape) if entry.order == "C" else part.as_strided(like.shape, like.stride())

    def load(self) -> None:
        """Bring the buffer up to date with the flat tensor."""
        if self.placement == "staged":
            self._host.copy_(self.flat)
        elif self.placement == "device":
            share_stream(self.device)

    def store(self) -> None:
        """Bring the flat tensor up to date with the buffer."""
        if self.placement == "staged":
            self.flat.copy_(self._host)


def entry_of(name: str, tensor: torch.Tensor, group: int | None) -> Entry:
    """Describe a tensor for a flat layout: complex numbers as pairs of real numbers, along a last axis.

    Args:
        name: name of the tensor.
        tensor: parameter or buffer of a model.
        group: number of the parameter group, None for a buffer.
    """
    tensor, order = as_real(tensor), "C"
    if not tensor.is_contiguous() and group is not None:
        for memory_format in (torch.channels_last, torch.channels_last_3d):
            if tensor.is_contiguous(memory_format=memory_format):
                order = str(memory_format).removeprefix("torch.")
    return Entry(name, tuple(tensor.shape), dtype_name(tensor), group, order)


def device_of(parameters: Mapping[str, torch.Tensor]) -> torch.device:
    """Return the device of all parameters.

    Raises:
        ConfigurationError: if they are on different devices.
    """
    by_device = {parameter.device: name for name, parameter in parameters.items()}
    if len(by_device) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in by_device.items())
        raise ConfigurationError(f"all trainable parameters of a replica must be on one device, found {found}")
    return next(iter(by_device))


def placement_on(device: torch.device, takes_device_arrays: bool, staged: bool) -> Placement:
    """Choose where the flat tensors of a model are.

    Args:
        device: device of the model.
        takes_device_arrays: whether the transport sends device arrays directly.
        staged: whether to keep a copy in host memory even where none is needed.
    """
    if staged or (device.type != "cpu" and not (device.type == "cuda" and takes_device_arrays)):
        return "staged"
    return "host" if device.type == "cpu" else "device"
