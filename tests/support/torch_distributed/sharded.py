"""FSDP, tensors that are distributed over a mesh of ranks, tensor parallelism and pipelines."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import FEATURES, Tensors, Uneven, loss_of, sgd, state_of, train


def _mesh() -> dist.DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp() -> Tensors:
    return _fully_sharded(MixedPrecisionPolicy())


def fsdp_in_bfloat16() -> Tensors:
    return _fully_sharded(MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def _fully_sharded(policy: MixedPrecisionPolicy) -> Tensors:
    model = Uneven()
    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=_mesh(), mp_policy=policy)
    fully_shard(model, mesh=_mesh(), mp_policy=policy)
    optimizer, losses = sgd(model), []
    for step in range(4):
        loss = loss_of(model, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.detach().float(), norm.full_tensor() if isinstance(norm, DTensor) else norm]
    return {"losses and norms": torch.stack(losses), **_whole_state(model)}


def _whole_state(model: nn.Module) -> Tensors:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def earlier_fsdp() -> Tensors:
    return train(FullyShardedDataParallel(Uneven(), device_id=torch.device("cpu"), use_orig_params=True))


def distributed_tensors() -> Tensors:
    mesh = _mesh()
    torch.manual_seed(3)
    left, right = torch.randn(7, 5), torch.randn(5, 4)
    rows, columns = distribute_tensor(left, mesh, [Shard(0)]), distribute_tensor(right, mesh, [Shard(1)])
    found = {
        "rows": rows.full_tensor(),
        "columns from rows": rows.redistribute(mesh, [Shard(1)]).to_local(),
        "rows by whole": (rows @ distribute_tensor(right, mesh, [Replicate()])).full_tensor(),
        "whole by columns": (distribute_tensor(left, mesh, [Replicate()]) @ columns).full_tensor(),
        "partial": (rows.redistribute(mesh, [Shard(1)]) @ distribute_tensor(right, mesh, [Shard(0)])).full_tensor(),
        "mean": rows.mean().full_tensor(),
        "largest": rows.max().full_tensor(),
        "standard deviation": rows.std().full_tensor(),
    }
    return {name: value for name, value in found.items() if value.numel()}


def tensor_parallel() -> Tensors:
    torch.manual_seed(4)
    mesh = _mesh()
    model = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 1))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer, losses = sgd(model), []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(8, FEATURES, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    whole = {name: value.full_tensor() for name, value in state_of(model).items() if isinstance(value, DTensor)}
    return {"losses": torch.stack(losses), **whole}


def mesh_of_two_dimensions() -> Tensors:
    """Replicas of one rank, or shards of one rank."""
    size = dist.get_world_size()
    found = {}
    for shape in ((1, size), (size, 1)):
        torch.manual_seed(2)
        model = Uneven()
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        train(model, steps=2)
        found |= {f"{shape[0] == 1} {name}": value for name, value in _whole_state(model).items()}
    return found


def pipeline() -> Tensors:
    """A stage of the model on each rank, and four microbatches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    inputs = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(9))
    optimizer = sgd(module)
    for _ in range(3):
        if rank == 0:
            schedule.step(inputs)
        elif rank == size - 1:
            schedule.step(target=inputs.sin())
        else:
            schedule.step()
        optimizer.step()
        optimizer.zero_grad()
    return state_of(module)
