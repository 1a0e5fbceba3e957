"""A description of a PyTorch optimizer, by which ranks check that all of them have wrapped the same one."""

from collections.abc import Mapping
from typing import Any

import torch

from lentando.optimizers.optimizer_description import (
    OptimizerDescription,
    by_group,
    in_plain_words,
    plain_attributes,
    qualified_name,
)
from lentando.torch.inner_optimizers import states

__all__ = ["describe_optimizer", "short_description"]

IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
"""Entries of a parameter group that do not change the mathematics: ranks on different devices may differ in them."""
RATES = {"lr", "initial_lr", "max_lr", "min_lr"}
"""The learning rate, and the entries that torch's schedulers add to it."""


def describe_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerDescription:
    """Describe the class of an optimizer, and the hyperparameters in its parameter groups and plain attributes."""
    words = _hyperparameters(optimizer)
    attributes, others = plain_attributes(optimizer, {*words, *IMPLEMENTATION, *RATES})
    return OptimizerDescription(
        qualified_name(type(optimizer)),
        {name: value for name, value in words.items() if name not in RATES},
        {name: value for name, value in words.items() if name in RATES},
        ", ".join(filter(None, [_state_in_words(optimizer), others])),
        attributes,
    )


def short_description(optimizer: torch.optim.Optimizer) -> str:
    """Return the class of an optimizer with its hyperparameters as keyword arguments, for ``repr``, in one line."""
    shown = [f"{name}={text}" for name, text in _hyperparameters(optimizer).items() if text not in ("None", "False")]
    return f"{type(optimizer).__name__}({', '.join(shown)})"


def _hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Describe the entries of parameter groups that are hyperparameters, by name."""
    groups = optimizer.param_groups
    names = sorted({str(name) for group in groups for name in group} - IMPLEMENTATION)
    return {
        name: by_group([in_plain_words(group[name], _plain) if name in group else "not there" for group in groups])
        for name in names
    }


def _state_in_words(optimizer: torch.optim.Optimizer) -> str:
    """Describe the state of an optimizer and of those that it holds: for how many parameters, and at which step.

    An entry that contains nothing but None does not count as state: not all optimizers make such entries.
    """
    kept = 0
    steps = set()
    for _, state in states(optimizer):
        for entry in state.values():
            if isinstance(entry, Mapping) and any(value is not None for value in entry.values()):
                kept += 1
                if "step" in entry:
                    steps.add(in_plain_words(entry["step"], _plain))
    if not kept:
        return "no state"
    counted = f", at step {', '.join(sorted(steps))}" if steps else ""
    return f"state for {kept} {'parameter' if kept == 1 else 'parameters'}{counted}"


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
