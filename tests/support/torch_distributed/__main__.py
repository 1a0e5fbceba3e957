"""One rank of a job that runs what PyTorch's users build on torch.distributed, over one backend.

    torchrun --nproc-per-node 2 tests/support/torch_distributed gloo FOLDER
    mpirun -np 2 python tests/support/torch_distributed lentando FOLDER ddp.plain

Each case is a function that returns tensors (``program_cases.py``). They are written to one safetensors
file for each rank, by the names of case and tensor; the traceback of a case that raises an error goes to a file next to
it. ``--checkpoint`` names a folder for what a job leaves for another one with more ranks.
"""

import argparse
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import checkpoints
import torch
import torch.distributed as dist
from program_cases import names, run
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

TIMEOUT = timedelta(seconds=30)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", default=names())
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about names that programs still use
    if options.backend == "lentando":
        import lentando.c10d  # noqa: F401  (registers the backend)
    dist.init_process_group(options.backend, timeout=TIMEOUT)
    checkpoints.FOLDER = options.checkpoint
    found, errors = {}, {}
    for name in options.cases:
        torch.manual_seed(1)
        print(f"rank {dist.get_rank()} begins {name}", file=sys.stderr, flush=True)
        try:
            found |= {
                f"{name}: {key}": value.detach().clone(memory_format=torch.contiguous_format)
                for key, value in run(name).items()
            }
        except (Exception, CheckpointException):  # noqa: BLE001 - the test reports it
            errors[name] = traceback.format_exc()
    rank = dist.get_rank()
    save_file(found, options.folder / f"{rank}.safetensors")
    (options.folder / f"{rank}.errors.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()
    if options.backend == "gloo":
        os._exit(0)  # its threads may log errors after their store is closed


if __name__ == "__main__":
    main()
