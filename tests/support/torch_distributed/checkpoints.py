"""torch.distributed.checkpoint: what a job saves, and another one with more ranks loads."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training import Tensors, Uneven, train

FOLDER: Path | None = None
"""Where checkpoints are, if another job loads or has saved them."""


def _trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Uneven()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, steps)
    return model, optimizer


def _whole(state: dict[str, Any], prefix: str = "") -> Tensors:
    found: Tensors = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= _whole(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            found[prefix + str(name)] = value.full_tensor() if isinstance(value, DTensor) else value
    return found


def saved() -> Tensors:
    assert FOLDER is not None
    model, optimizer = _trained(steps=3)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=FOLDER / "sharded")
    future = dcp.async_save(state, checkpoint_id=FOLDER / "in the background")
    future.result()  # type: ignore[union-attr]
    return _whole(state)


def loaded() -> Tensors:
    """Whatever a job, of as many ranks or of others, has saved."""
    assert FOLDER is not None
    model, optimizer = _trained(steps=1)  # an optimizer has no state before its first step
    found = {}
    for name in ("sharded", "in the background"):
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=FOLDER / name)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        model_state, optimizer_state = get_state_dict(model, optimizer)
        found |= _whole({name: {"model": model_state, "optimizer": optimizer_state}})
    return found
