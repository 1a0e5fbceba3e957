"""The state of a PyTorch optimizer: its own ``state``, and that of optimizers that it holds (Lookahead, SAM)."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from lentando.comm.errors import ConfigurationError
from lentando.torch.local_tensors import identity

__all__ = [
    "held_states",
    "inner_optimizers",
    "inner_states",
    "load_unchanged",
    "load_with_inner",
    "reset",
    "states",
    "tensors_in",
]

OWN_CONTAINERS = {"state", "param_groups", "defaults"}
"""Attributes that every optimizer has, in which no other optimizer is held."""


def inner_optimizers(optimizer: torch.optim.Optimizer) -> dict[str, torch.optim.Optimizer]:
    """Find the optimizers that this one holds, directly or in another one, by path.

    A path is ``"base_optimizer"`` or ``"parts.0"``, for example. Optimizers are held as attributes, or in lists, tuples
    and dicts that are attributes (as where Muon for matrices is combined with AdamW for the rest).
    """
    found: dict[str, torch.optim.Optimizer] = {}
    seen = {id(optimizer)}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, torch.optim.Optimizer) and id(value) not in seen:
            seen.add(id(value))
            found[path] = value
            walk(value, f"{path}.")

    def walk(outer: torch.optim.Optimizer, path: str) -> None:
        for name, value in vars(outer).items():
            if name in OWN_CONTAINERS:
                continue
            visit(value, f"{path}{name}")
            if isinstance(value, list | tuple):
                for number, item in enumerate(value):
                    visit(item, f"{path}{name}.{number}")
            elif isinstance(value, dict):
                for key, item in value.items():
                    visit(item, f"{path}{name}.{key}")

    walk(optimizer, "")
    return found


def held_states(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state dicts of all optimizers that this one holds, by path, empty ones too."""
    return {path: holder.state_dict() for path, holder in inner_optimizers(optimizer).items()}


def inner_states(optimizer: torch.optim.Optimizer, packed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the state dicts of the optimizers that this one holds, by path, where its own state dict lacks them.

    Args:
        optimizer: optimizer that holds others.
        packed: state dict of ``optimizer``.
    """
    known = tensors_in(packed)
    return {path: state for path, state in held_states(optimizer).items() if not tensors_in(state) <= known}


def tensors_in(packed: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Identify the tensors that a packed state holds for parameters, by address and number of elements.

    Copies of a state dict share its tensors.
    """
    return {
        identity(value)
        for state in packed["state"].values()
        if isinstance(state, Mapping)
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }


def load_with_inner(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], inner: Mapping[str, Mapping[str, Any]]
) -> None:
    """Load a state dict of an optimizer, and those of the optimizers that it holds.

    Args:
        optimizer: optimizer that holds others.
        state_dict: state dict of ``optimizer``.
        inner: state dicts by path, as ``inner_states`` or ``held_states`` returned them.

    Raises:
        ConfigurationError: if the optimizer does not hold all of these optimizers.
    """
    held = inner_optimizers(optimizer)
    if unknown := sorted(inner.keys() - held.keys()):
        raise ConfigurationError(
            f"the state dict contains the state of an optimizer {unknown[0]!r}, which the saved "
            f"{type(optimizer).__name__} held and the present one does not hold: construct it as it was then"
        )
    for path, state in inner.items():
        load_unchanged(held[path], state)
    load_unchanged(optimizer, state_dict)


def states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
    """Yield the ``state`` of an optimizer and of those that it holds, each once, with its path ("" for its own)."""
    seen: set[int] = set()
    for path, holder in ({"": optimizer} | inner_optimizers(optimizer)).items():
        if id(holder.state) not in seen:
            seen.add(id(holder.state))
            yield path, holder.state


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Reset the state to that of an optimizer that has taken no step.

    Raises:
        ConfigurationError: if the optimizer keeps state where it cannot be reset.
    """
    # The state is emptied, not set to zero: the optimizer then creates its own initial state (Adam's step count and
    # bias correction, Rprop's step sizes, NAdam's product of momenta).
    holders = [optimizer, *inner_optimizers(optimizer).values()]
    for holder in holders:
        holder.state.clear()
    if not type(optimizer).__module__.startswith("torch.optim."):
        left = optimizer.state_dict().get("state")
        if left:
            raise ConfigurationError(
                f"base_buffers='reset': a {type(optimizer).__name__} keeps state elsewhere than in its attribute "
                "'state' and in optimizers that it holds, so it cannot be reset. Use base_buffers='maintain'"
            )
    for holder in holders:
        if isinstance(holder, torch.optim.Adagrad):  # the only one that creates its state at construction
            for group in holder.param_groups:
                for parameter in group["params"]:
                    start = group["initial_accumulator_value"]
                    holder.state[parameter] = {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, start)}


def load_unchanged(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict as ``optimizer.load_state_dict`` does, but keep the dtype of each saved tensor.

    PyTorch would convert tensors to the dtype of their parameter. Parameter groups that an optimizer shares with one
    that it holds stay shared.
    """
    inner = inner_optimizers(optimizer)
    sharing = [holder for holder in inner.values() if holder.param_groups is optimizer.param_groups]
    optimizer.load_state_dict(dict(state_dict))
    for holder in sharing:
        if holder.param_groups is not optimizer.param_groups:  # loaded into the held one, whose list is a new one now
            optimizer.param_groups = holder.param_groups
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        saved = state_dict["state"].get(number)
        if not isinstance(saved, Mapping):
            continue
        for _, state in states(optimizer):
            loaded = state.get(parameter)
            if isinstance(loaded, dict):
                for key, value in saved.items():
                    now = loaded.get(key)
                    if (
                        isinstance(value, torch.Tensor)
                        and isinstance(now, torch.Tensor)
                        and now.dtype != value.dtype
                        and now.shape == value.shape
                    ):
                        loaded[key] = value.to(device=now.device, copy=True)
