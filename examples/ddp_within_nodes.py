"""DistributedDataParallel within each node, and SlowMo between the nodes.

    mpirun -np 4 python examples/ddp_within_nodes.py --ranks-per-node 2
    torchrun --nproc-per-node 4 examples/ddp_within_nodes.py --ranks-per-node 2

Gradients are averaged over the ranks of a node at each step. Once in a period, ranks of equal number within their nodes
average parameters: each of these groups has the same values, and computes the same outer step.
"""

import argparse

import torch
import torch.distributed as dist

import lentando.torch as lt

parser = argparse.ArgumentParser()
parser.add_argument("--ranks-per-node", type=int, help="default: as many as this node has")
options = parser.parse_args()

lt.init()
if not dist.is_initialized():  # under torchrun, init() has made a group over Gloo
    import lentando.c10d  # noqa: F401 - registers the backend

    dist.init_process_group("lentando")
count = options.ranks_per_node or lt.local_size()
node, _ = dist.new_subgroups(count)
between = [lt.add_process_set(range(local, lt.size(), count)) for local in range(count)]

torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1), process_group=node)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = lt.SlowMo(optimizer, model=model, period=4, slow_momentum=0.5, process_set=between[lt.rank() % count])

generator = torch.Generator().manual_seed(lt.rank())
for _ in range(24):
    inputs = torch.randn(8, 4, generator=generator)
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"rank {lt.rank()}: weights {model.module.weight.tolist()[0]}, bias {model.module.bias.item()}")
