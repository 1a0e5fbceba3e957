"""Local SGD of PyTorch, and optimizers whose state is sharded."""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook
from torch.distributed.algorithms.model_averaging import averagers, hierarchical_model_averager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import Tensors, Uneven, sgd, train


def post_local_sgd() -> Tensors:
    subgroup, _ = dist.new_subgroups(1)
    return _post_local(averagers.PeriodicModelAverager(period=3, warmup_steps=2), subgroup)


def hierarchical_sgd() -> Tensors:
    """The whole job is the only group: PyTorch wants powers of the number of ranks."""
    periods = hierarchical_model_averager.OrderedDict([(2, dist.get_world_size())])
    averager = hierarchical_model_averager.HierarchicalModelAverager(periods, warmup_steps=1)
    subgroup, _ = dist.new_subgroups(1)
    return _post_local(averager, subgroup)


def _post_local(averager: averagers.ModelAverager, subgroup: dist.ProcessGroup) -> Tensors:
    model = DistributedDataParallel(Uneven())
    state = post_localSGD_hook.PostLocalSGDState(None, subgroup, start_localSGD_iter=2)
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    return train(model, PostLocalSGDOptimizer(sgd(model), averager), steps=7)


def zero() -> Tensors:
    return _zero(parameters_as_bucket_view=False)


def zero_in_buckets() -> Tensors:
    return _zero(parameters_as_bucket_view=True)


def _zero(parameters_as_bucket_view: bool) -> Tensors:
    model = DistributedDataParallel(Uneven())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.Adam, parameters_as_bucket_view=parameters_as_bucket_view, lr=0.01
    )
    found = train(model, optimizer)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        state = optimizer.state_dict()["state"]
        found |= {f"state of {number}": values["exp_avg_sq"] for number, values in state.items()}
    return found
