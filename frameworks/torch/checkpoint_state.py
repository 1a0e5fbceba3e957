"""A PyTorch model and its optimizer as checkpoints see them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.layers import Layer
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState, Reading
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.stopping import SaveOnSignal, StopHandle
from lentando.torch.convert import as_array, as_tensor, to_plain, to_torch
from lentando.torch.inner_optimizers import inner_optimizers, load_unchanged, tensors_in
from lentando.torch.model import TorchModel
from lentando.torch.model_layers import layers
from lentando.torch.wrappable import AVERAGED, as_real

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
                own = holder.state_dict()
                _check_packed(holder, own)
                if not tensors_in(own) <= known:  # otherwise they are in what the one that holds it gives, and loads
                    rest["inner"][path] = self._rest_of(holder, own, f"{path}.", tensors)
        reading, obstacle = self._reading(tensors)
        is_empty = not packed["state"] and not rest.get("inner")
        return OptimizerState(type(self._optimizer).__name__, tensors, rest, reading, obstacle, is_empty)

    def check_optimizer_state(self, state: OptimizerState) -> None:
        """Of the same class, for the same parameters in the same groups: torch restores the settings too."""
        inner = inner_optimizers(self._optimizer)
        if inner and "inner" not in state.rest and not state.is_empty:
            raise CheckpointError(
                f"the checkpoint lacks what the {state.kind} keeps in the optimizers that it holds "
                f"({', '.join(inner)}): it was written by an earlier version, which did not save that. Load with "
                "optimizer_state='new' to begin with a fresh one"
            )
        saved_inner = state.rest.get("inner", {})
        if unknown := sorted(saved_inner.keys() - inner.keys()):
            raise CheckpointError(
                f"the saved {state.kind} held an optimizer {unknown[0]!r}, which the one here does not hold: make it "
                "as it was made then, or load with optimizer_state='new'"
            )
        names = set(self._model.names().values())
        pairs = [(self._optimizer, state.rest), *((inner[path], rest) for path, rest in saved_inner.items())]
        for holder, rest in pairs:
            then = [len(group["params"]) for group in rest["groups"]]
            now = [len(group["params"]) for group in holder.param_groups]
            if then != now:
                raise CheckpointError(
                    f"the saved {state.kind} had parameter groups of {_counted(then)} parameters, the one here has "
                    f"groups of {_counted(now)}: give it the same groups, or load with optimizer_state='new'"
                )
            if unknown := sorted(rest["parameters"].keys() - names):
                raise CheckpointError(f"the saved {state.kind} keeps state of {unknown[0]!r}, which is not known here")

    def store_optimizer_state(self, state: OptimizerState) -> None:
        inner = inner_optimizers(self._optimizer)
        for holder in inner.values():
            holder.state.clear()
        # First those that are held: what holds them then sees to it that parameter groups are shared as they were.
        saved_inner = state.rest.get("inner", {})
        for path, rest in saved_inner.items():
            self._load(inner[path], rest, _under(f"{path}.", state.tensors))
        own = {
            key: by_name
            for key, by_name in state.tensors.items()
            if not any(key.startswith(f"{path}.") for path in saved_inner)
        }
        self._load(self._optimizer, state.rest, own)

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

    def _rest_of(
        self,
        holder: torch.optim.Optimizer,
        packed: Mapping[str, Any],
        prefix: str,
        tensors: dict[str, dict[str, Array]],
    ) -> dict[str, Any]:
        """Add an optimizer's tensors to ``tensors``, by keys that begin with ``prefix``. Returns all else."""
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
        """What the numbers in a packed state stand for: names and parameters."""
        names = self._model.names()
        return {
            number: (names[parameter], parameter)
            for group, own in zip(packed["param_groups"], holder.param_groups, strict=True)
            for number, parameter in zip(group["params"], own["params"], strict=True)
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
        """Hand over to an optimizer, which numbers its parameters."""
        holder = self._optimizer if holder is None else holder
        numbered: dict[Any, Any] = dict(others or {})
        names = self._model.names()
        for group, own in zip(groups, holder.param_groups, strict=True):
            for number, parameter in zip(group["params"], own["params"], strict=True):
                if names[parameter] in by_parameter:
                    saved = by_parameter[names[parameter]].items()
                    numbered[number] = {key: _in_strides_of(parameter, value) for key, value in saved}
        load_unchanged(holder, {**(more or {}), "state": numbered, "param_groups": groups})

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
    return isinstance(value, torch.Tensor) and value.dtype in AVERAGED and value.shape == parameter.shape


def _check_packed(holder: torch.optim.Optimizer, packed: Any) -> None:
    there = isinstance(packed, Mapping) and isinstance(packed.get("state"), Mapping)
    if not there or [len(group["params"]) for group in packed.get("param_groups", ())] != [
        len(group["params"]) for group in holder.param_groups
    ]:
        raise CheckpointError(
            f"{type(holder).__name__}.state_dict() is not what torch.optim documents: a dict with 'state' and the "
            "'param_groups' that the optimizer has. It cannot be saved here"
        )


def _under(prefix: str, tensors: Mapping[str, Mapping[str, Array]]) -> dict[str, Mapping[str, Array]]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _number(key: str) -> Any:
    return int(key) if key.lstrip("-").isdigit() else key


def _counted(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def _in_strides_of(parameter: torch.Tensor, value: Any) -> Any:
    """What was saved of an optimizer's state: a tensor of the parameter's shape gets its memory order, too."""
    if isinstance(value, torch.Tensor) and parameter.is_complex() and value.shape == (*parameter.shape, 2):
        value = torch.view_as_complex(value)
    if not _is_like(value, parameter):
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
