"""Accelerate on several ranks: ``mpirun -np 2 python examples/accelerate_loop.py FOLDER [--resume]``."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lentando.torch as lt

lt.init(hide_launcher=True)  # otherwise Accelerate detects several ranks, and starts torch.distributed
folder, resume = sys.argv[1], "--resume" in sys.argv
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
torch.manual_seed(0)
x = torch.randn(640, 8)
data = TensorDataset(x, (x.sum(1) > 0).long())
sampler = DistributedSampler(data, lt.size(), lt.rank())  # Accelerate knows one rank, and does not shard
network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 2))
sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
slowmo = lt.SlowMo(sgd, model=network, period=12, slow_momentum=0.5)
steps = torch.optim.lr_scheduler.StepLR(slowmo, step_size=10, gamma=0.8)
model, optimizer, scheduler = accelerator.prepare(network, slowmo, steps)
loader = accelerator.prepare(DataLoader(data, batch_size=16, sampler=sampler))
if resume:
    accelerator.load_state(f"{folder}/epoch0/rank{lt.rank()}")
for epoch in range(1 if resume else 0, 3):
    loader.set_epoch(epoch)  # not of the sampler: the loader would set it again
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.save_state(f"{folder}/epoch{epoch}/rank{lt.rank()}")  # the replica and slow momentum of this rank
with slowmo.averaged():
    print(f"rank {lt.rank()} of {lt.size()}: loss {torch.nn.functional.cross_entropy(network(x), data.tensors[1])}")
