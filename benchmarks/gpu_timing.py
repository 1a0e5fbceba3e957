"""What the benchmarks on a GPU share: their options, time on a device, and the facts of the machine.

``--dry-run`` does all of it on the CPU with small models, so that a mistake in these programs is found without a GPU.
Its figures mean nothing.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import destinations
import measuring
import torch
from measuring import Sample, machine, measure
from mpi4py import MPI

ON_A_CPU = "DRY RUN ON A CPU: these figures mean nothing. "


def parse(doc: str | None, *, repeats: int) -> argparse.Namespace:
    """Parse the options that all benchmarks on a GPU have, and make the GPU the current device: ``device``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small models on the CPU: shows that the program works")
    parser.add_argument("--json", type=destinations.file, metavar="FILE", help="write the figures to FILE")
    options = measuring.parse(parser, repeats=repeats)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here: --dry-run measures nothing, but shows that the program works")
    options.device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    if not options.dry_run:
        torch.cuda.set_device(options.device)
    return options


def wait(device: torch.device) -> None:
    """Wait until the device has done all that was enqueued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    device: torch.device, cases: Mapping[str, Callable[[], object]], repeats: int, calls: int
) -> dict[str, Sample]:
    """Time the cases in turn: mean seconds of a call in so many, from an idle device to an idle device."""

    def call(work: Callable[[], object]) -> None:
        for _ in range(calls):
            work()
        wait(device)

    found = measure(MPI.COMM_WORLD, {name: partial(call, work) for name, work in cases.items()}, repeats)
    return {name: Sample(tuple(seconds / calls for seconds in sample.seconds)) for name, sample in found.items()}


def where(options: argparse.Namespace) -> str:
    """The card, its driver, and what ``measuring.machine`` says, in one sentence."""
    if options.dry_run:
        return f"{ON_A_CPU}PyTorch {torch.__version__}; {machine()}."
    card = torch.cuda.get_device_properties(options.device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return (
        f"{card.name}, {card.total_memory / 2**30:.0f} GiB, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"NCCL {nccl}; {machine()}."
    )


def write_json(file: Path | None, figures: Mapping[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")
