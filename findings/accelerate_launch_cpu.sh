#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
#
# Most would expect that `accelerate launch --cpu --num_processes 3 train.py` starts three processes. Seen: it starts one,
# with status 0 and no warning about it, and the program trains alone on all of the data. Only a file of hosts for mpirun
# (--mpirun_hostfile), or GPUs, lead to several.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0 2>/dev/null
cat > "$folder/train.py" <<'PYTHON'
from accelerate import Accelerator

accelerator = Accelerator()
print(f"process {accelerator.process_index} of {accelerator.num_processes}", flush=True)
PYTHON
found=$("$folder/venv/bin/accelerate" launch --cpu --num_processes 3 --num_machines 1 --mixed_precision no \
    --dynamo_backend no "$folder/train.py" 2>/dev/null)
echo "$found"
[ "$found" = "process 0 of 1" ]
