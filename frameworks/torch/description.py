"""A PyTorch optimizer in plain words, by which ranks see whether all have wrapped the same."""

from collections.abc import Mapping
from typing import Any

import torch

from lentando.optimizers.optimizer_description import OptimizerDescription, by_group, in_plain_words, qualified_name
from lentando.torch.inner_optimizers import states

__all__ = ["describe_optimizer"]

IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
"""What a parameter group holds that leaves the mathematics alone: ranks on different devices may differ in it."""
RATES = {"lr", "initial_lr", "max_lr", "min_lr"}
"""The learning rate, and what torch's schedulers put beside it."""


def describe_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerDescription:
    """Its class, and what its parameter groups hold beside parameters."""
    groups = optimizer.param_groups
    names = sorted({str(name) for group in groups for name in group} - IMPLEMENTATION)
    words = {
        name: by_group([in_plain_words(group[name], _plain) if name in group else "not there" for group in groups])
        for name in names
    }
    return OptimizerDescription(
        qualified_name(type(optimizer)),
        {name: value for name, value in words.items() if name not in RATES},
        {name: value for name, value in words.items() if name in RATES},
        _state_in_words(optimizer),
    )


def _state_in_words(optimizer: torch.optim.Optimizer) -> str:
    """What it and the optimizers that it holds keep for parameters, and their counts of steps.

    An entry that holds nothing but None is no state: some optimizers make these where others make none.
    """
    kept = 0
    steps = set()
    for _, state in states(optimizer):
        for own in state.values():
            if isinstance(own, Mapping) and any(value is not None for value in own.values()):
                kept += 1
                if "step" in own:
                    steps.add(in_plain_words(own["step"], _plain))
    if not kept:
        return "no state"
    counted = f", at step {', '.join(sorted(steps))}" if steps else ""
    return f"state for {kept} {'parameter' if kept == 1 else 'parameters'}{counted}"


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
