#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo), Python 3.11.
#
# torch.distributed.checkpoint writes a tensor that is not sharded once, however many ranks pass it to `save`. Most
# would expect that, where ranks hold different values (replicas between two averages, BatchNorm statistics under DDP),
# the checkpoint has those of one rank, such as rank 0. Seen: `save` divides the writing among the ranks tensor by
# tensor, so that the checkpoint is patched together: of three layers that are 0 on rank 0 and 1 on rank 1, some weights
# and biases come back as 0 and others as 1, in the same layer, on both ranks, without an error or a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2>/dev/null
cat >"$folder/replicas.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))


def fill(value):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)


fill(rank)
dcp.save({"model": model.state_dict()}, checkpoint_id=sys.argv[1])
fill(-1)
state = {"model": model.state_dict()}
dcp.load(state, checkpoint_id=sys.argv[1])
found = [None, None]
dist.all_gather_object(found, {name: int(tensor.flatten()[0]) for name, tensor in state["model"].items()})
if rank == 0:
    print("the rank that each tensor is from:", found[0])
dist.destroy_process_group()
assert found[0] == found[1]
assert set(found[0].values()) == {0, 1}, "all tensors are from one rank"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/replicas.py" \
    "$folder/checkpoint" 2>/dev/null
