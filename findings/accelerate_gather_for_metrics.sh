#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
#
# `Accelerator.gather_for_metrics` drops the samples that were repeated to fill the last batch. Most would expect that
# without repeated samples, such as with one process, it returns every sample. Seen: it cuts the last batch to
# len(dataset) % batch_size, whatever the sampler yields. Of 7 samples that a SubsetRandomSampler, a RandomSampler with
# num_samples=7, or a batch sampler draws from a data set of 10 in batches of 4, it returns 6: the last batch of 3 is
# cut to 10 % 4 = 2. There is no error and no warning, and metrics are computed from the rest.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0 2>/dev/null
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

accelerator = Accelerator(cpu=True)
data = TensorDataset(torch.arange(10))
cases = {
    "SubsetRandomSampler": {"sampler": SubsetRandomSampler(range(7)), "batch_size": 4},
    "RandomSampler": {"sampler": RandomSampler(data, num_samples=7), "batch_size": 4},
    "BatchSampler": {"batch_sampler": BatchSampler(range(7), 4, drop_last=False)},
}
for name, arguments in cases.items():
    loaded, gathered = 0, 0
    for (batch,) in accelerator.prepare(DataLoader(data, **arguments)):
        loaded += len(batch)
        gathered += len(accelerator.gather_for_metrics(batch))
    print(f"{name}: {accelerator.num_processes} process, {loaded} samples loaded, {gathered} gathered")
    assert (accelerator.num_processes, loaded, gathered) == (1, 7, 6)
PYTHON
