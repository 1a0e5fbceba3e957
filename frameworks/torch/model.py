"""A PyTorch model and its optimizer as the replica sees them: flat buffers, learning rates, optimizer state."""

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from itertools import chain
from math import nan
from typing import Literal, TypeAlias

import torch
from torch.utils.dlpack import from_dlpack

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, FlatLayout, build_layouts
from lentando.comm.transport import Array
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.rules.gradient_layout import gradient_layouts
from lentando.optimizers.weight_watch import SampledWeights, WeightWatch
from lentando.torch.convert import as_array, as_device_array, as_tensor, dtype_name, share_stream
from lentando.torch.description import describe_optimizer
from lentando.torch.device_watch import DeviceWatch
from lentando.torch.inner_optimizers import reset, states
from lentando.torch.not_averaged import Unaveraged, parts_of, store_parts
from lentando.torch.parameters import Parameters
from lentando.torch.wrappable import (
    AVERAGED,
    address,
    as_real,
    check_parameters,
    check_sendable,
    check_separate,
    is_averaged,
    write,
)

__all__ = ["TorchModel", "dense_gradient"]

Place: TypeAlias = Literal["host", "staged", "device"]
"""Where the flat tensors lie: in host memory, from where they travel; on a device, from where they are copied there; on
a device, from where they travel."""


class TorchModel:
    """Implements ``lentando.optimizers.framework.ChangingFramework`` for PyTorch.

    The memory of the optimizer's trainable parameters becomes part of one flat tensor per dtype: averaging needs no
    packing. Each parameter has a storage of its own over its part, so that whatever saves, sends or compares tensors by
    their storage (``torch.save``, safetensors, accelerate) finds the same as before. Their values do not change. On a
    GPU the flat tensor is what travels, if the transport takes device arrays; else it is copied to host memory and back
    for each communication. Neither has been run on a GPU yet.

    Args:
        optimizer: the base optimizer; its parameters are averaged.
        model: whose floating-point buffers (BatchNorm statistics) are averaged with them; and names for messages.
        named_parameters: names for messages, if there is no ``model``.
        takes_device_arrays: whether the transport does.
        shares_memory: whether neighbours on this node should be able to read the flat tensors.
        staged: keep host memory apart from the parameters even on the CPU, as a GPU needs it. For tests.

    Attributes:
        optimizer, module: ``optimizer`` and ``model`` as given.
        known: names of the tensors, averaged or not, that there were when the buffers were laid out.
    """

    name = "torch"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | None = None,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        takes_device_arrays: bool = False,
        shares_memory: bool = False,
        staged: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.module = model
        self._trained = Parameters(optimizer, model, named_parameters)
        self._unaveraged = Unaveraged()
        layouts = self.next_layouts()
        device = _device(self._parameters)
        self._kind_of_memory = device, _place(device, takes_device_arrays, staged), shares_memory
        self._allocate(layouts)

    @property
    def _parameters(self) -> dict[str, torch.Tensor]:
        """The trainable ones, as they are laid out."""
        return self._trained.trainable

    def _allocate(self, layouts: Sequence[FlatLayout]) -> None:
        """Make the flat tensors, and move the parameters into them."""
        self._memory = [_Memory(layout, *self._kind_of_memory) for layout in layouts]
        self.buffers: Sequence[FlatBuffer] = [memory.buffer for memory in self._memory]
        self._homes: dict[str, int] = {}
        self._is_resized = False
        self._bind()
        self.watch: WeightWatch = (
            SampledWeights(self.buffers)
            if self.is_on_host
            else DeviceWatch((memory.layout, memory.flat) for memory in self._memory)
        )
        rest = (parts_of(name, tensor) for name, tensor in self._rest().items())
        self.known = frozenset(entry.name for layout in layouts for entry in layout.entries).union(*rest)

    def has_changed(self) -> bool:
        return self._is_resized or self._trained.have_changed()

    def next_layouts(self) -> list[FlatLayout]:
        trainable, _, group_of = self._trained.found()
        if not trainable:
            raise ConfigurationError("the optimizer has no trainable parameter: nothing could be averaged")
        self._saved_names = set() if self.module is None else set(self.module.state_dict())
        statistics = self._statistics()
        clash = sorted(statistics.keys() & group_of.keys())
        if clash:
            raise ConfigurationError(f"parameters and buffers must have different names, both have {clash}")
        check_parameters(trainable)
        if self.module is not None:
            check_separate(trainable, chain(self.module.named_parameters(), self.module.named_buffers()))
        else:
            check_separate(trainable, ())
        _device(trainable)
        # Those of complex numbers come first, so that each number lies at a multiple of its own size.
        in_order = sorted(trainable.items(), key=lambda item: not item[1].is_complex())
        entries = [_entry(name, parameter, group_of[name]) for name, parameter in in_order]
        return build_layouts([*entries, *(_entry(name, buffer, None) for name, buffer in statistics.items())])

    def replaced(self) -> Set[str]:
        return self._trained.replaced()

    def change_layout(self) -> None:
        layouts, before = self.next_layouts(), self._parameters
        self._trained.read()
        for name, parameter in before.items():
            if self._parameters.get(name) is not parameter:
                parameter.data = parameter.data.clone()  # so that the memory of before can be freed
        self.__dict__.pop("flat_gradients", None)
        weights_set = self.watch.found
        self._allocate(layouts)
        self.watch.reset(weights_set)

    def left_out(self) -> Sequence[str]:
        return self._trained.left_out()

    def _bind(self) -> None:
        """Move the parameters into the flat tensors."""
        for memory in self._memory:
            for number, entry in enumerate(memory.layout.entries):
                if entry.group is not None:
                    parameter = self._parameters[entry.name]
                    own = memory.tensor(number, parameter)
                    own.copy_(parameter.detach())
                    parameter.data = own
                    self._homes[entry.name] = own.data_ptr()

    @property
    def is_on_host(self) -> bool:
        """Whether the parameters are where they travel from, in host memory."""
        return self._memory[0].place == "host"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._memory[0].device

    @property
    def gradients(self) -> Sequence[FlatBuffer]:
        return [memory.buffer for memory in self.flat_gradients.memory]

    @cached_property
    def flat_gradients(self) -> "_Gradients":
        """Where gradients are averaged."""
        return _Gradients(self._parameters, self._memory)

    def not_averaged(self) -> Mapping[str, Array]:
        arrays: dict[str, Array] = {}
        for name, tensor in self._rest().items():
            check_sendable(name, tensor)
            arrays |= {part: as_array(own.cpu()) for part, own in parts_of(name, tensor).items()}
        return arrays

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None:
        given = {name: as_tensor(array) for name, array in tensors.items()}
        with torch.no_grad():
            for name, tensor in self._rest().items():
                store_parts(name, tensor, given)
        self._unaveraged.note(self._rest())

    def _rest(self) -> dict[str, torch.Tensor]:
        """Frozen parameters and integer buffers."""
        rest = dict(self._trained.frozen)
        if self.module is not None:
            averaged = {entry.name for memory in self._memory for entry in memory.layout.entries}
            for name, tensor in self.module.state_dict(keep_vars=True).items():
                if name not in averaged and isinstance(tensor, torch.Tensor):
                    # What is written to a detached sparse tensor does not reach the one that it was detached from.
                    rest[name] = tensor.detach() if tensor.layout is torch.strided else tensor
        homes = set(self._homes.values()) - {0}  # tied parameters are in the state dict under each of their names
        return {name: tensor for name, tensor in rest.items() if address(tensor) not in homes}

    def names(self) -> dict[torch.Tensor, str]:
        """The optimizer's parameters, trainable or frozen, with their names."""
        return {parameter: name for name, parameter in (self._parameters | self._trained.frozen).items()}

    def load(self) -> None:
        self._check_unchanged()
        statistics = self._statistics()
        for memory in self._memory:
            for number, entry in enumerate(memory.layout.entries):
                if entry.group is None and self._has_its_shape(entry, statistics):
                    memory.view(number, statistics[entry.name]).copy_(statistics[entry.name])
            memory.load()
        self._unaveraged.warn_of_changes(self._rest)

    def store(self) -> None:
        statistics = self._statistics()
        for memory in self._memory:
            memory.store()
            for number, entry in enumerate(memory.layout.entries):
                if entry.group is None and self._has_its_shape(entry, statistics):
                    write(statistics[entry.name], memory.view(number, statistics[entry.name]))

    def _has_its_shape(self, entry: Entry, statistics: Mapping[str, torch.Tensor]) -> bool:
        """Whether a statistic still has the shape that is laid out. Else it is laid out anew before the next round.

        Raises:
            ConfigurationError: if it is gone.
        """
        found = statistics.get(entry.name)
        if found is None:
            raise ConfigurationError(
                f"buffer {entry.name!r}, which is averaged, is no longer in the model, or now has no average: "
                "change the model first, wrap after that"
            )
        has = tuple(found.shape) == entry.shape
        self._is_resized = self._is_resized or not has
        return has

    def learning_rates(self) -> Sequence[float]:
        return [nan if (rate := group.get("lr")) is None else float(rate) for group in self.optimizer.param_groups]

    def describe_optimizer(self) -> OptimizerDescription:
        return describe_optimizer(self.optimizer)

    def optimizer_buffers(self) -> Mapping[str, Array]:
        return {name: as_array(as_real(tensor).cpu()) for name, tensor in self._state_tensors().items()}

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        for name, tensor in self._state_tensors().items():
            as_real(tensor).copy_(as_tensor(averaged[name]))

    def reset_optimizer(self) -> None:
        reset(self.optimizer)

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        """The base optimizer's floating-point tensors of a parameter's shape; its counters and scalars are left out."""
        return {
            f"{name}.{path}{'.' if path else ''}{key}": value
            for path, state in states(self.optimizer)
            for name, parameter in self._parameters.items()
            for key, value in sorted(state.get(parameter, {}).items())
            if isinstance(value, torch.Tensor) and value.dtype in AVERAGED and value.shape == parameter.shape
        }

    def _statistics(self) -> dict[str, torch.Tensor]:
        """The model's buffers that are averaged: the floating-point and complex ones that are part of its state.

        Complex ones as real numbers. Asked for each time, for modules replace them.
        """
        if self.module is None:
            return {}
        return {
            name: as_real(buffer.detach())
            for name, buffer in self.module.named_buffers()
            if name in self._saved_names and is_averaged(buffer)
        }

    def _check_unchanged(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.data_ptr() != self._homes[name]:
                raise ConfigurationError(
                    f"parameter {name!r} no longer uses the memory that it had when the optimizer was wrapped: "
                    "model.to(), .half(), or an assignment to .data has replaced it. Move and convert the model first, "
                    "wrap after that; load weights with load_state_dict, which writes in place"
                )


class _Memory:
    """The flat tensor of one dtype on the model's device, and the buffer that travels.

    Attributes:
        layout, device, place, shared: as given.
        flat: the tensor.
        buffer: the same memory, or a copy of it in host memory that is kept apart.
    """

    def __init__(self, layout: FlatLayout, device: torch.device, place: Place, shared: bool) -> None:
        self.layout = layout
        self.device = device
        self.place = place
        self.shared = shared
        if place == "device":
            self.flat = torch.zeros(layout.size, dtype=getattr(torch, layout.dtype.name), device=device)
            self.buffer = FlatBuffer(layout, as_device_array(self.flat))
            return
        self._host = as_tensor(FlatBuffer(layout, shared=shared).array)
        if device.type != "cpu":
            self._host = self._host.pin_memory()
        self.flat = torch.zeros_like(self._host, device=device) if place == "staged" else self._host
        self.buffer = FlatBuffer(layout, as_array(self._host))

    def view(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Entry ``number`` with the shape and memory order of ``like``."""
        start, entry = self.layout.offsets[number], self.layout.entries[number]
        flat = self.flat[start : start + entry.size]
        return flat.view(entry.shape) if entry.order == "C" else flat.as_strided(like.shape, like.stride())

    def tensor(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Entry ``number`` as ``view`` gives it, but with a storage of its own over the same memory.

        The flat tensor's memory stays as long as this one is in use.
        """
        start, entry = self.layout.offsets[number], self.layout.entries[number]
        # A view of the flat tensor would have the whole of it as its storage. Through DLPack, on every device and for
        # every dtype, comes a tensor whose storage begins and ends where the entry does.
        part = from_dlpack(self.flat[start : start + entry.size])
        if like.is_complex():
            return torch.view_as_complex(part.view(entry.shape))
        return part.view(entry.shape) if entry.order == "C" else part.as_strided(like.shape, like.stride())

    def load(self) -> None:
        if self.place == "staged":
            self._host.copy_(self.flat)
        elif self.place == "device":
            share_stream(self.device)

    def store(self) -> None:
        if self.place == "staged":
            self.flat.copy_(self._host)


class _Gradients:
    """Flat gradients, and for each parameter whether it has one.

    Attributes:
        parameters: the trainable ones, by name.
        memory: by dtype.
        views: where each parameter's gradient belongs, by name: tensors over the flat memory, each with a storage of
            its own.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], memory: Sequence[_Memory]) -> None:
        self.parameters = parameters
        device, place, shared = memory[0].device, memory[0].place, memory[0].shared
        layouts = gradient_layouts(own.layout for own in memory)
        self.memory = [_Memory(layout, device, place, shared) for layout in layouts]
        self.views: Mapping[str, torch.Tensor] = {
            entry.name: own.tensor(number, parameters[entry.name])
            for own in self.memory
            for number, entry in enumerate(own.layout.entries[:-1])
        }

    def gather(self, present_already: bool = False) -> None:
        """Copy the model's gradients in.

        Args:
            present_already: they are there, and only which there are must be noted.
        """
        for memory in self.memory:
            *trained, _ = memory.layout.entries
            presence = memory.view(len(trained), memory.flat)
            present = []
            for entry in trained:
                parameter = self.parameters[entry.name]
                view, gradient = self.views[entry.name], dense_gradient(entry.name, parameter)
                present.append(gradient is not None)
                if gradient is None:
                    view.zero_()
                elif not present_already and gradient.data_ptr() != view.data_ptr():
                    view.copy_(gradient)
            presence.copy_(torch.tensor(present, dtype=presence.dtype))
            memory.load()

    def scatter(self) -> None:
        """Give the model the averaged gradients, as tensors over the flat memory."""
        for memory in self.memory:
            memory.store()
            *trained, _ = memory.layout.entries
            present = memory.view(len(trained), memory.flat).tolist()
            for number, entry in enumerate(trained):
                parameter = self.parameters[entry.name]
                # An alias, so that nothing the user does to this tensor's shape reaches the one that is kept here.
                parameter.grad = self.views[entry.name].detach() if present[number] > 0 else None


def dense_gradient(name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a parameter, if it has one.

    Raises:
        ConfigurationError: if it is sparse.
    """
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise ConfigurationError(
            f"parameter {name!r} has a sparse gradient, which is not averaged here: use sparse=False"
        )
    return parameter.grad


def _entry(name: str, tensor: torch.Tensor, group: int | None) -> Entry:
    """A tensor as the flat buffers know it: a complex one as pairs of real numbers, along a last axis."""
    tensor, order = as_real(tensor), "C"
    if not tensor.is_contiguous() and group is not None:
        for memory_format in (torch.channels_last, torch.channels_last_3d):
            if tensor.is_contiguous(memory_format=memory_format):
                order = str(memory_format).removeprefix("torch.")
    return Entry(name, tuple(tensor.shape), dtype_name(tensor), group, order)


def _device(parameters: Mapping[str, torch.Tensor]) -> torch.device:
    by_device = {parameter.device: name for name, parameter in parameters.items()}
    if len(by_device) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in by_device.items())
        raise ConfigurationError(f"all trainable parameters of a replica must be on one device, found {found}")
    return next(iter(by_device))


def _place(device: torch.device, takes_device_arrays: bool, staged: bool) -> Place:
    if staged or (device.type != "cpu" and not (device.type == "cuda" and takes_device_arrays)):
        return "staged"
    return "host" if device.type == "cpu" else "device"
