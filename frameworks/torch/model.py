"""The adapter of a PyTorch model and its optimizer: flat buffers, learning rates and optimizer state for a replica."""

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from itertools import chain
from math import isnan, nan

import torch

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, FlatLayout, build_layouts
from lentando.comm.transport import Array
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.weight_watch import SampledWeights, WeightWatch
from lentando.torch.convert import as_array, as_tensor
from lentando.torch.description import describe_optimizer
from lentando.torch.device_watch import DeviceWatch
from lentando.torch.flat_gradients import TorchGradients
from lentando.torch.flat_memory import FlatMemory, device_of, entry_of, placement_on
from lentando.torch.inner_optimizers import reset, states
from lentando.torch.local_tensors import address, as_real, release_memory, use_memory, write
from lentando.torch.not_averaged import Unaveraged, parts_of, store_parts
from lentando.torch.parameters import Parameters
from lentando.torch.wrappable import AVERAGED, check_parameters, check_sendable, check_separate, is_averaged

__all__ = ["TorchModel"]


class TorchModel:
    """Implements ``lentando.optimizers.framework.ChangingFramework`` for PyTorch.

    The memory of the optimizer's trainable parameters becomes part of one flat tensor per dtype, so that averages need
    no packing. The values do not change. Each parameter has a storage of its own over its part of the flat tensor, so
    that code which saves, sends or compares tensors by their storage (``torch.save``, safetensors, accelerate) works as
    before. On a GPU the flat tensor is sent directly if the transport takes device arrays; otherwise it is copied to
    host memory and back for each communication. Neither has been run on a GPU yet.

    Args:
        optimizer: base optimizer, whose parameters are averaged.
        model: model whose floating-point buffers (BatchNorm statistics) are averaged with the parameters, and whose
            names appear in messages.
        named_parameters: pairs of name and parameter that provide the names for messages if there is no ``model``.
        takes_device_arrays: whether the transport sends device arrays directly.
        shares_memory: whether the flat tensors are in memory that the other ranks of this node can read.
        sparse_as_dense: whether sparse gradients are averaged like dense ones.
        staged: whether to keep a copy in host memory even on the CPU, as GPUs may need it. For tests.

    Attributes:
        optimizer, module: ``optimizer`` and ``model`` as given.
        known: names of all tensors, averaged or not, that the model had when the buffers were laid out.
    """

    name = "torch"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | None = None,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        takes_device_arrays: bool = False,
        shares_memory: bool = False,
        sparse_as_dense: bool = False,
        staged: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.module = model
        self._sparse_as_dense = sparse_as_dense
        self._trained = Parameters(optimizer, model, named_parameters)
        self._unaveraged = Unaveraged({})
        layouts = self.next_layouts()
        device = device_of(self._parameters)
        self._kind_of_memory = device, placement_on(device, takes_device_arrays, staged), shares_memory
        self._allocate(layouts)

    @property
    def _parameters(self) -> dict[str, torch.Tensor]:
        """The trainable parameters by name, as they are laid out."""
        return self._trained.trainable

    def _allocate(self, layouts: Sequence[FlatLayout]) -> None:
        """Allocate the flat tensors, and move the parameters into them."""
        self._memory = [FlatMemory(layout, *self._kind_of_memory) for layout in layouts]
        self._on_device = [memory for memory in self._memory if memory.placement != "host"]
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
        device_of(trainable)
        # Complex parameters come first, so that each number begins at a multiple of its own size.
        in_order = sorted(trainable.items(), key=lambda item: not item[1].is_complex())
        entries = [entry_of(name, parameter, group_of[name]) for name, parameter in in_order]
        return build_layouts([*entries, *(entry_of(name, buffer, None) for name, buffer in statistics.items())])

    def replaced(self) -> Set[str]:
        return self._trained.replaced()

    def change_layout(self) -> None:
        layouts, before = self.next_layouts(), self._parameters
        self._trained.read()
        for name, parameter in before.items():
            if self._parameters.get(name) is not parameter:
                release_memory(parameter)
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
                    self._homes[entry.name] = use_memory(parameter, memory.tensor(number, parameter))

    @property
    def is_on_host(self) -> bool:
        """Whether the parameters are sent directly from host memory."""
        return self._memory[0].placement == "host"

    @property
    def fills_buckets(self) -> bool:
        """Whether gradients are averaged during the backward pass where the base algorithm has buckets for them."""
        return self.is_on_host

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._memory[0].device

    @property
    def gradients(self) -> Sequence[FlatBuffer]:
        return [memory.buffer for memory in self.flat_gradients.memory]

    def gradient_parts(self) -> Sequence[Sequence[Array]]:
        return self.flat_gradients.parts()

    @cached_property
    def flat_gradients(self) -> TorchGradients:
        """The flat tensors in which gradients are averaged, allocated when they are first needed."""
        return TorchGradients(self._parameters, self._memory, self._sparse_as_dense)

    def not_averaged(self) -> Mapping[str, Array]:
        arrays: dict[str, Array] = {}
        for name, tensor in self._rest().items():
            check_sendable(name, tensor)
            arrays |= {name_of_part: as_array(part.cpu()) for name_of_part, part in parts_of(name, tensor).items()}
        return arrays

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None:
        given = {name: as_tensor(array) for name, array in tensors.items()}
        with torch.no_grad():
            for name, tensor in self._rest().items():
                store_parts(name, tensor, given)
        self._unaveraged = Unaveraged(self._rest())

    def _rest(self) -> dict[str, torch.Tensor]:
        """The tensors that are not averaged: frozen parameters and integer buffers."""
        rest = dict(self._trained.frozen)
        if self.module is not None:
            averaged = {entry.name for memory in self._memory for entry in memory.layout.entries}
            for name, tensor in self.module.state_dict(keep_vars=True).items():
                if name not in averaged and isinstance(tensor, torch.Tensor):
                    # Values written to a detached sparse tensor do not reach the tensor that it was detached from.
                    rest[name] = tensor.detach() if tensor.layout is torch.strided else tensor
        homes = set(self._homes.values()) - {0}  # a state dict has tied parameters under each of their names
        return {name: tensor for name, tensor in rest.items() if address(tensor) not in homes}

    def names(self) -> dict[torch.Tensor, str]:
        """Return the name of each of the optimizer's parameters, trainable or frozen."""
        return {parameter: name for name, parameter in (self._parameters | self._trained.frozen).items()}

    def load(self) -> None:
        self._check_unchanged()
        statistics = self._statistics()
        for memory in self._memory:
            for number, entry in enumerate(memory.layout.entries):
                if entry.group is None and self._has_its_shape(entry, statistics):
                    memory.view(number, statistics[entry.name]).copy_(statistics[entry.name])
        for memory in self._on_device:
            memory.load()
        if self._unaveraged.exist:
            self._unaveraged.warn_of_changes(self._rest())

    def store(self) -> None:
        statistics = self._statistics()
        for memory in self._on_device:
            memory.store()
        for memory in self._memory:
            for number, entry in enumerate(memory.layout.entries):
                if entry.group is None and self._has_its_shape(entry, statistics):
                    write(statistics[entry.name], memory.view(number, statistics[entry.name]))

    def _has_its_shape(self, entry: Entry, statistics: Mapping[str, torch.Tensor]) -> bool:
        """Return whether a statistic still has the shape that is laid out; otherwise have it laid out again.

        Raises:
            ConfigurationError: if it is no longer in the model.
        """
        statistic = statistics.get(entry.name)
        if statistic is None:
            raise ConfigurationError(
                f"buffer {entry.name!r}, which is averaged, is no longer in the model, or its dtype can no longer be "
                "averaged: change the model first, and wrap the optimizer after that"
            )
        has_its_shape = tuple(statistic.shape) == entry.shape
        self._is_resized = self._is_resized or not has_its_shape
        return has_its_shape

    def learning_rates(self) -> Sequence[float]:
        return [nan if (rate := group.get("lr")) is None else float(rate) for group in self.optimizer.param_groups]

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each parameter group; where it is NaN, the group has none and is left alone."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isnan(rate):
                continue
            if isinstance(group["lr"], torch.Tensor):  # of a capturable optimizer, which needs the same tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

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
        """The base optimizer's floating-point tensors of a parameter's shape, without its counters and scalars."""
        return {
            f"{name}.{path}{'.' if path else ''}{key}": value
            for path, state in states(self.optimizer)
            for name, parameter in self._parameters.items()
            for key, value in sorted(state.get(parameter, {}).items())
            if isinstance(value, torch.Tensor) and value.dtype in AVERAGED and value.shape == parameter.shape
        }

    def _statistics(self) -> dict[str, torch.Tensor]:
        """The model's buffers that are averaged: those of floating-point and complex dtypes in its state dict.

        Complex numbers are viewed as real ones. Looked up at each call, because modules replace their buffers.
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
            if address(parameter) != self._homes[name]:
                raise ConfigurationError(
                    f"parameter {name!r} no longer uses the memory that it had when the optimizer was wrapped: "
                    "model.to(), .half(), or an assignment to .data has replaced it. Move and convert the model before "
                    "wrapping its optimizer; load weights with load_state_dict, which writes in place"
                )
