#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11.
#
# `model.save_pretrained(folder, is_main_process=True)` is documented to write the weights on the process that says that it
# is the main one. Most would expect that each rank of torch.distributed can save its own model in its own folder so (an
# expert, a member of an ensemble, a replica between two averages). Seen: if there is a default process group, the ranks
# above 0 create the folder and write nothing, without an error or a warning, whatever is_main_process says; the Trainer's
# checkpoints, too, then lack the model on these ranks. Without a process group, all is written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 2>/dev/null
cat > "$folder/save.py" <<'PYTHON'
import os
import sys

import torch.distributed as dist
from transformers import BertConfig, BertModel

if sys.argv[1] == "with":
    dist.init_process_group("gloo")
rank = os.environ["RANK"]
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
own = f"{sys.argv[2]}/{sys.argv[1]}/rank{rank}"
BertModel(config).save_pretrained(own, is_main_process=True)
print(f"{sys.argv[1]} a process group, rank {rank}: {', '.join(sorted(os.listdir(own))) or 'nothing'}", flush=True)
if sys.argv[1] == "with":
    dist.barrier()
    dist.destroy_process_group()
PYTHON
found=$(for group in with without; do
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/save.py" "$group" "$folder" 2>/dev/null | sort
done)
echo "$found"
[ "$found" = "with a process group, rank 0: config.json, model.safetensors
with a process group, rank 1: nothing
without a process group, rank 0: config.json, model.safetensors
without a process group, rank 1: config.json, model.safetensors" ]
