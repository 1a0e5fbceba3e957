"""A PyTorch model and its optimizer as checkpoints see them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.layers import Layer
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState, Reading
from lentando.optimizers.replica import Replica
from lentando.optimizers.stopping import SaveOnSignal, StopHandle
from lentando.torch.convert import as_array, as_tensor, to_plain, to_torch
from lentando.torch.layers import layers
from lentando.torch.model import TorchModel

__all__ = ["TorchTraining"]

ADAM = {"first": "exp_avg", "second": "exp_avg_sq", "largest_second": "max_exp_avg_sq"}
"""Torch's names for what Adam keeps."""


class TorchTraining:
    """Implements ``lentando.optimizers.checkpoint.training.Training`` for PyTorch.

    Args:
        replica: the replica.
        model: what it drives.
    """

    def __init__(self, replica: Replica, model: TorchModel) -> None:
        self.replica = replica
        self._model = model
        self._optimizer = model.optimizer

    def optimizer_state(self) -> OptimizerState:
        tensors: dict[str, dict[str, Array]] = {}
        others: dict[str, dict[str, Any]] = {}
        names = self._model.names()
        for parameter, state in self._optimizer.state.items():
            others[names[parameter]] = other = {}
            for key, value in state.items():
                if _is_like(value, parameter):
                    tensors.setdefault(key, {})[names[parameter]] = as_array(value.cpu())
                else:
                    other[key] = to_plain(value)
        rest = {"parameters": others, "groups": to_plain(self._optimizer.state_dict()["param_groups"])}
        reading, obstacle = self._reading(tensors)
        kind = type(self._optimizer).__name__
        return OptimizerState(kind, tensors, rest, reading, obstacle, is_empty=not self._optimizer.state)

    def check_optimizer_state(self, state: OptimizerState) -> None:
        """Of the same class, for the same parameters in the same groups: torch restores the settings too."""

    def store_optimizer_state(self, state: OptimizerState) -> None:
        by_parameter: dict[str, dict[str, Any]] = {
            name: dict(to_torch(other)) for name, other in state.rest["parameters"].items()
        }
        for key, by_name in state.tensors.items():
            for name, array in by_name.items():
                by_parameter[name][key] = as_tensor(array)
        self._store(by_parameter, to_torch(state.rest["groups"]))

    def check_neutral_state(self, state: NeutralState) -> None:
        state.check(type(self._optimizer).__name__, *self._rule())

    def store_neutral_state(self, state: NeutralState) -> None:
        by_parameter: dict[str, dict[str, Any]] = {}
        for quantity, by_name in state.quantities.items():
            key = ADAM.get(quantity, "momentum_buffer")
            for name, array in by_name.items():
                by_parameter.setdefault(name, {})[key] = as_tensor(array)
        if state.steps is not None:
            for own in by_parameter.values():
                own["step"] = torch.tensor(float(state.steps), dtype=torch.float32)
        self._store(by_parameter, self._optimizer.state_dict()["param_groups"])

    def new_optimizer_state(self) -> None:
        self._model.reset_optimizer()

    def random_state(self) -> dict[str, Array]:
        """Of PyTorch's global generators (dropout draws from them): the CPU's, and that of the model's GPU."""
        states = {"cpu": torch.get_rng_state()}
        if self._model.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._model.device)
        return {name: as_array(state) for name, state in states.items()}

    def restore_random_state(self, state: Mapping[str, Array]) -> None:
        if "cpu" in state:
            torch.set_rng_state(as_tensor(state["cpu"]))
        if "cuda" in state and self._model.device.type == "cuda":
            torch.cuda.set_rng_state(as_tensor(state["cuda"]), self._model.device)

    def layers(self) -> Sequence[Layer] | None:
        return None if self._model.module is None else layers(self._model.module)

    def to_plain(self, extra: Any) -> Any:
        return to_plain(extra, "extra")

    def from_plain(self, extra: Any) -> Any:
        return to_torch(extra)

    def stopping(self, stop: SaveOnSignal) -> StopHandle:
        return stop

    def _store(self, by_parameter: Mapping[str, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Hand over to the optimizer, which numbers its parameters."""
        numbered: dict[int, dict[str, Any]] = {}
        number = 0
        names = self._model.names()
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if names[parameter] in by_parameter:
                    numbered[number] = {
                        key: torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # in the parameter's strides
                        if _is_like(value, parameter)
                        else value
                        for key, value in by_parameter[names[parameter]].items()
                    }
                number += 1
        self._optimizer.load_state_dict({"state": numbered, "param_groups": groups})

    def _rule(self) -> tuple[str | None, set[str]]:
        """What the optimizer follows, and what it keeps; as in ``torch.optim``'s documented formulas."""
        groups = self._optimizer.param_groups
        if type(self._optimizer) is torch.optim.SGD:
            return "momentum", {"momentum"} if any(group["momentum"] for group in groups) else set()
        if type(self._optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            largest = {"largest_second"} if any(group["amsgrad"] for group in groups) else set()
            return "adam", {"first", "second", *largest}
        return None, set()

    def _reading(self, tensors: Mapping[str, Mapping[str, Array]]) -> tuple[Reading | None, str]:
        rule, quantities = self._rule()
        if rule is None:
            return None, "only SGD, Adam and AdamW are known in several frameworks"
        if rule == "momentum":
            return Reading(rule, dict.fromkeys(quantities, ("momentum_buffer", 1.0))), ""
        keys = {quantity: (ADAM[quantity], 1.0) for quantity in quantities}
        counts = {float(state["step"]) for state in self._optimizer.state.values()}
        unused = [
            name
            for parameter, name in self._model.names().items()
            if parameter.requires_grad and parameter not in self._optimizer.state
        ]
        if len(counts) > 1 or (counts and unused):
            return None, (
                "it counts the steps of each parameter, others those of all together, but here not all parameters have "
                f"taken part in every step (such as {unused[0] if unused else 'those that had no gradient at times'})"
            )
        return Reading(rule, keys, int(counts.pop()) if counts else 0), ""


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == parameter.shape
