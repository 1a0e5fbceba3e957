#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo), Python 3.11.
#
# Most would expect that PyTorch's model averagers (PeriodicModelAverager, PostLocalSGDOptimizer) average each parameter
# with the same parameter of the other ranks. Seen: each rank packs those of its parameters that have a gradient into
# one buffer, and the buffers are added as they come. If rank 0 has used expert 0 in its last batch and rank 1 expert 1,
# of the same size, then the experts are averaged with each other, without an error or a warning. Expert 0 (10 on both
# ranks) becomes 15 on rank 0 and stays 10 on rank 1; expert 1 (20 on both ranks) becomes 15 on rank 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2>/dev/null
cat >"$folder/experts.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

dist.init_process_group("gloo")
rank = dist.get_rank()
experts = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(2))
for expert, value in zip(experts, (10.0, 20.0)):
    torch.nn.init.constant_(expert.weight, value)
sgd = torch.optim.SGD(experts.parameters(), lr=0.001)
optimizer = PostLocalSGDOptimizer(sgd, PeriodicModelAverager(period=2))
experts[rank](torch.ones(1, 1)).sum().backward()
optimizer.step()
found = [None, None]
dist.all_gather_object(found, [round(expert.weight.item(), 1) for expert in experts])
if rank == 0:
    print("experts of rank 0:", found[0], "of rank 1:", found[1])
dist.destroy_process_group()
assert found == [[15.0, 20.0], [10.0, 15.0]]
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/experts.py"
