"""The state of a PyTorch model and its optimizer in the form that checkpoints save and load."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.layers import Layer
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState, Reading, Tensors
from lentando.optimizers.checkpoint.replica_training import ReplicaTraining
from lentando.optimizers.replica import Replica
from lentando.torch.convert import as_array, as_tensor, to_plain, to_torch
from lentando.torch.inner_optimizers import inner_optimizers, load_unchanged, tensors_in
from lentando.torch.local_tensors import as_complex, as_real
from lentando.torch.model import TorchModel
from lentando.torch.model_layers import layers
from lentando.torch.wrappable import AVERAGED

__all__ = ["TorchTraining"]

ADAM = {"first": "exp_avg", "second": "exp_avg_sq", "largest_second": "max_exp_avg_sq"}
"""Names of the state of ``torch.optim.Adam``, by the names that all frameworks share."""


class TorchTraining(ReplicaTraining):
    """Implements ``lentando.optimizers.checkpoint.training.Training`` for PyTorch.

    Args:
        replica: replica that the model belongs to.
        model: model that is saved and loaded.
    """

    def __init__(self, replica: Replica, model: TorchModel) -> None:
        super().__init__(replica, model.optimizer)
        self._model = model
        self._optimizer = model.optimizer

    def optimizer_state(self) -> OptimizerState:
        packed = self._optimizer.state_dict()
        _check_packed(self._optimizer, packed)
        tensors: dict[str, dict[str, Array]] = {}
        rest = self._rest_of(self._optimizer, packed, "", tensors)
        more = {key: to_plain(value) for key, value in packed.items() if key not in ("state", "param_groups")}
        if more:
            rest["more"] = more
        if inner := inner_optimizers(self._optimizer):
            rest["inner"] = {}
            known = tensors_in(packed)
            for path, holder in inner.items():
                packed_inner = holder.state_dict()
                _check_packed(holder, packed_inner)
                if not tensors_in(packed_inner) <= known:  # otherwise the optimizer that holds it saves and loads them
                    rest["inner"][path] = self._rest_of(holder, packed_inner, f"{path}.", tensors)
        reading, obstacle = self._reading(tensors)
        is_empty = not packed["state"] and not rest.get("inner")
        return OptimizerState(self._kind, tensors, rest, reading, obstacle, is_empty)

    def check_optimizer_state(self, state: OptimizerState) -> None:
        """Check that a saved state is for the same parameters in the same groups, because torch restores settings, too.

        Raises:
            CheckpointError: if it is not.
        """
        inner = inner_optimizers(self._optimizer)
        if inner and "inner" not in state.rest and not state.is_empty:
            raise CheckpointError(
                f"the checkpoint lacks the state of the optimizers that the {state.kind} holds "
                f"({', '.join(inner)}): it was written by an earlier version, which did not save it. Load with "
                "optimizer_state='new' to begin with a new optimizer"
            )
        saved_inner = state.rest.get("inner", {})
        if unknown := sorted(saved_inner.keys() - inner.keys()):
            raise CheckpointError(
                f"the saved {state.kind} held an optimizer {unknown[0]!r}, which the present one does not hold: "
                "construct it as it was then, or load with optimizer_state='new'"
            )
        names = set(self._model.names().values())
        pairs = [(self._optimizer, state.rest), *((inner[path], rest) for path, rest in saved_inner.items())]
        for holder, rest in pairs:
            then = [len(group["params"]) for group in rest["groups"]]
            now = [len(group["params"]) for group in holder.param_groups]
            if then != now:
                raise CheckpointError(
                    f"the saved {state.kind} had parameter groups of {_listed(then)} parameters, the present one has "
                    f"groups of {_listed(now)}: give it the same groups, or load with optimizer_state='new'"
                )
            if unknown := sorted(rest["parameters"].keys() - names):
                raise CheckpointError(
                    f"the saved {state.kind} has state of {unknown[0]!r}, which is no parameter of the present model"
                )

    def store_optimizer_state(self, state: OptimizerState) -> None:
        inner = inner_optimizers(self._optimizer)
        for holder in inner.values():
            holder.state.clear()
        # The held optimizers come first: the optimizer that holds them then restores how parameter groups are shared.
        saved_inner = state.rest.get("inner", {})
        for path, rest in saved_inner.items():
            self._load(inner[path], rest, _under(f"{path}.", state.tensors))
        outer = {
            key: by_name
            for key, by_name in state.tensors.items()
            if not any(key.startswith(f"{path}.") for path in saved_inner)
        }
        self._load(self._optimizer, state.rest, outer)

    def store_neutral_state(self, state: NeutralState) -> None:
        by_parameter: dict[str, dict[str, Any]] = {}
        for quantity, by_name in state.quantities.items():
            key = ADAM.get(quantity, "momentum_buffer")
            for name, array in by_name.items():
                by_parameter.setdefault(name, {})[key] = as_tensor(array)
        if state.steps is not None:
            for entry in by_parameter.values():
                entry["step"] = torch.tensor(float(state.steps), dtype=torch.float32)
        self._store(by_parameter, self._optimizer.state_dict()["param_groups"])

    def random_state(self) -> dict[str, Array]:
        """Return the states of PyTorch's global generators (used by dropout): that of the CPU and that of the GPU."""
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

    def _rest_of(
        self,
        holder: torch.optim.Optimizer,
        packed: Mapping[str, Any],
        prefix: str,
        tensors: dict[str, dict[str, Array]],
    ) -> dict[str, Any]:
        """Add an optimizer's tensors to ``tensors``, under keys that begin with ``prefix``, and return the rest."""
        names = self._names_by_number(holder, packed)
        others: dict[str, dict[str, Any]] = {}
        numbered: dict[str, Any] = {}
        for number, state in packed["state"].items():
            if number not in names or not isinstance(state, Mapping):
                numbered[str(number)] = to_plain(state)
                continue
            name, parameter = names[number]
            others[name] = other = {}
            for key, value in state.items():
                if _is_like(value, parameter):
                    tensors.setdefault(f"{prefix}{key}", {})[name] = as_array(as_real(value).cpu())
                else:
                    other[key] = to_plain(value)
        rest: dict[str, Any] = {"parameters": others, "groups": to_plain(packed["param_groups"])}
        if numbered:
            rest["other state"] = numbered
        return rest

    def _names_by_number(
        self, holder: torch.optim.Optimizer, packed: Mapping[str, Any]
    ) -> dict[Any, tuple[str, torch.Tensor]]:
        """The name and the parameter that each number in a packed state stands for."""
        names = self._model.names()
        return {
            number: (names[parameter], parameter)
            for saved, group in zip(packed["param_groups"], holder.param_groups, strict=True)
            for number, parameter in zip(saved["params"], group["params"], strict=True)
            if parameter in names
        }

    def _load(
        self, holder: torch.optim.Optimizer, rest: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Array]]
    ) -> None:
        by_parameter: dict[str, dict[str, Any]] = {
            name: dict(to_torch(other)) for name, other in rest["parameters"].items()
        }
        for key, by_name in tensors.items():
            for name, array in by_name.items():
                by_parameter[name][key] = as_tensor(array)
        others = {_number(key): to_torch(value) for key, value in rest.get("other state", {}).items()}
        self._store(by_parameter, to_torch(rest["groups"]), holder, others, to_torch(rest.get("more", {})))

    def _store(
        self,
        by_parameter: Mapping[str, dict[str, Any]],
        groups: list[dict[str, Any]],
        holder: torch.optim.Optimizer | None = None,
        others: Mapping[Any, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a state by names of parameters into an optimizer, whose state dict numbers its parameters."""
        holder = self._optimizer if holder is None else holder
        numbered: dict[Any, Any] = dict(others or {})
        names = self._model.names()
        for saved, group in zip(groups, holder.param_groups, strict=True):
            for number, parameter in zip(saved["params"], group["params"], strict=True):
                if names[parameter] in by_parameter:
                    entry = by_parameter[names[parameter]].items()
                    numbered[number] = {key: _in_strides_of(parameter, value) for key, value in entry}
        load_unchanged(holder, {**(more or {}), "state": numbered, "param_groups": groups})

    def _rule(self) -> tuple[str | None, set[str]]:
        """The update rule of the optimizer and the quantities that it keeps, by the formulas of ``torch.optim``."""
        groups = self._optimizer.param_groups
        if type(self._optimizer) is torch.optim.SGD:
            return "momentum", {"momentum"} if any(group["momentum"] for group in groups) else set()
        if type(self._optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            largest = {"largest_second"} if any(group["amsgrad"] for group in groups) else set()
            return "adam", {"first", "second", *largest}
        return None, set()

    def _reading(self, tensors: Tensors) -> tuple[Reading | None, str]:
        rule, quantities = self._rule()
        if rule is None:
            return super()._reading(tensors)
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
                "it counts the steps of each parameter, other frameworks those of all parameters together, but not all "
                f"parameters took part in every step (such as {unused[0] if unused else 'those without a gradient'})"
            )
        return Reading(rule, keys, int(counts.pop()) if counts else 0), ""


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in AVERAGED and value.shape == parameter.shape


def _check_packed(holder: torch.optim.Optimizer, packed: Any) -> None:
    has_state = isinstance(packed, Mapping) and isinstance(packed.get("state"), Mapping)
    if not has_state or [len(group["params"]) for group in packed.get("param_groups", ())] != [
        len(group["params"]) for group in holder.param_groups
    ]:
        raise CheckpointError(
            f"{type(holder).__name__}.state_dict() is not what torch.optim documents, a dict with 'state' and the "
            "'param_groups' that the optimizer has: it cannot be saved"
        )


def _under(prefix: str, tensors: Mapping[str, Mapping[str, Array]]) -> dict[str, Mapping[str, Array]]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _number(key: str) -> Any:
    return int(key) if key.lstrip("-").isdigit() else key


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def _in_strides_of(parameter: torch.Tensor, value: Any) -> Any:
    """Give a saved tensor of the parameter's shape the parameter's memory order; return other values unchanged."""
    if isinstance(value, torch.Tensor) and parameter.is_complex() and value.shape == (*parameter.shape, 2):
        value = as_complex(value)
    if not _is_like(value, parameter):
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
