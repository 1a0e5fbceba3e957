"""What the benchmarks on a GPU share: their options, time on a device, and the facts of the machine.

``--dry-run`` does all of it on the CPU with small models, so that a mistake in these programs is found without a GPU.
Its figures mean nothing.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import destinations
import torch
from measuring import Sample, machine

ON_A_CPU = "DRY RUN ON A CPU: these figures mean nothing. "


def parse(doc: str | None, *, repeats: int) -> argparse.Namespace:
    """Parse the options that all benchmarks on a GPU have, and make the GPU the current device: ``device``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small models on the CPU: shows that the program works")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="measurements of each, in turn (default %(default)s)"
    )
    parser.add_argument("--markdown", type=destinations.file, metavar="FILE", help="append the tables to FILE")
    parser.add_argument("--json", type=destinations.file, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args()
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


def seconds_per_call(device: torch.device, work: Callable[[], object], calls: int) -> float:
    """Mean seconds of a call, from an idle device to an idle device."""
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    wait(device)
    return (time.perf_counter() - started) / calls


def take_turns(
    device: torch.device, cases: Mapping[str, Callable[[], object]], repeats: int, calls: int
) -> dict[str, Sample]:
    """Time the cases in turn, forwards and backwards, after one call of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for work in cases.values():
        work()
    for repeat in range(repeats):
        for name in list(cases) if repeat % 2 else reversed(list(cases)):
            times[name].append(seconds_per_call(device, cases[name], calls))
    return {name: Sample(tuple(seconds)) for name, seconds in times.items()}


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
