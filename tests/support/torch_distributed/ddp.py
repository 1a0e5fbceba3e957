"""DistributedDataParallel, with each of the options that change what it communicates."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from training import FEATURES, Tensors, Uneven, batch, loss_of, sgd, state_of, train

SMALL_BUCKETS = {"bucket_cap_mb": 0.02}


def plain() -> Tensors:
    return train(DistributedDataParallel(Uneven()))


def small_buckets() -> Tensors:
    return train(DistributedDataParallel(Uneven(), **SMALL_BUCKETS))


def bucket_views() -> Tensors:
    return train(DistributedDataParallel(Uneven(), gradient_as_bucket_view=True, **SMALL_BUCKETS))


def static_graph() -> Tensors:
    return train(DistributedDataParallel(Uneven(), static_graph=True, **SMALL_BUCKETS))


def models_that_differ_at_the_start() -> Tensors:
    torch.manual_seed(dist.get_rank())
    return train(DistributedDataParallel(Uneven()))


def buffers() -> Tensors:
    return train(DistributedDataParallel(Uneven(normalization=True)))


class Branches(nn.Module):
    """Uses another branch on each rank and in each step, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in range(4))
        self.step = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.step += 1
        outputs: torch.Tensor = self.branches[(dist.get_rank() + self.step) % 3](inputs)
        return outputs


def unused_parameters() -> Tensors:
    return train(DistributedDataParallel(Branches(), find_unused_parameters=True))


def accumulated_gradients() -> Tensors:
    model = DistributedDataParallel(Uneven(), **SMALL_BUCKETS)

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        assert isinstance(model, DistributedDataParallel)
        with model.no_sync():
            for part in range(2):
                loss_of(model, 10 * step + part).backward()
        return loss_of(model, 10 * step + 2)

    return train(model, loss=loss)


def float16_messages() -> Tensors:
    return _with_hook(default_hooks.fp16_compress_hook, None)


def low_rank_messages() -> Tensors:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    return _with_hook(powerSGD_hook.powerSGD_hook, state)


def _with_hook(hook: Any, state: Any) -> Tensors:
    """With a single bucket: PowerSGD's callbacks communicate, and those of several would do so in any order."""
    model = DistributedDataParallel(Uneven())
    model.register_comm_hook(state, hook)
    return train(model)


def own_hook_that_chains_futures() -> Tensors:
    """A hook of the user's: what is done with a sum when it is complete."""

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()  # type: ignore[union-attr]
        halved = summed.then(lambda future: future.value()[0] / 2)
        signs: torch.futures.Future[torch.Tensor] = halved.then(lambda future: future.value().sign())
        return signs

    model = DistributedDataParallel(Uneven(), **SMALL_BUCKETS)
    model.register_comm_hook(None, hook)
    return train(model)


def mixed_dtypes() -> Tensors:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(FEATURES, 20)
            self.second = nn.Linear(20, 20, dtype=torch.float64)
            self.third = nn.Linear(20, 1, dtype=torch.bfloat16)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.third(self.second(self.first(inputs).double()).bfloat16())
            return outputs.float()

    return train(DistributedDataParallel(Mixed()))


def sparse_gradients() -> Tensors:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 3, sparse=True)
            self.linear = nn.Linear(3, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.linear(self.embedding(inputs.abs().mul(10).long().clamp(0, 9)[:, 0]))
            return outputs

    model = DistributedDataParallel(Embedded())
    return train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def ranks_with_fewer_batches() -> Tensors:
    model = DistributedDataParallel(Uneven(), **SMALL_BUCKETS)
    optimizer, losses = sgd(model), []
    with model.join():
        for step in range(3 + 2 * dist.get_rank()):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return {"losses": torch.stack(losses), **state_of(model)}


def ranks_with_fewer_batches_and_sharded_state() -> Tensors:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(Uneven())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    with Join([model, optimizer]):  # type: ignore[list-item]
        for step in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    return state_of(model)


def two_models_in_turn() -> Tensors:
    first, second = (DistributedDataParallel(Uneven(), **SMALL_BUCKETS) for _ in range(2))
    for step in range(3):
        (loss_of(first, step) * loss_of(second, step + 10)).backward()
    return {
        f"{number} {name}": value for number, model in enumerate((first, second)) for name, value in _gradients(model)
    }


def groups_of_one_rank_and_of_others() -> Tensors:
    """Rank 0 trains alone, the others together."""
    size = dist.get_world_size()
    groups = [dist.new_group([0]), dist.new_group(list(range(1, size)))]
    return train(DistributedDataParallel(Uneven(), process_group=groups[min(dist.get_rank(), 1)]))


def evaluation_between_steps() -> Tensors:
    """A sum of validation losses, and a barrier, between steps."""
    model = DistributedDataParallel(Uneven())
    optimizer, seen = sgd(model), []
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            inputs, targets = batch(100)
            loss = nn.functional.mse_loss(model.module(inputs), targets)
        dist.reduce(loss, 0)
        dist.broadcast(loss, 0)
        dist.barrier()
        seen.append(loss)
    return {"losses": torch.stack(seen), **state_of(model)}


def _gradients(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.grad.clone()) for name, value in model.named_parameters() if value.grad is not None]
