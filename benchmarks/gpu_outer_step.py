"""How long an outer step of SlowMo takes on a GPU, and the copies where parameters are sent through host memory.

    LENTANDO_TRANSPORT=nccl mpirun -np 1 python benchmarks/gpu_outer_step.py
    LENTANDO_TRANSPORT=mpi mpirun -np 1 python benchmarks/gpu_outer_step.py
    python benchmarks/gpu_outer_step.py --dry-run       without a GPU: shows that the program works

A single rank sends nothing, so that an outer step is its own arithmetic: it reads the parameters, the anchor and the
slow momentum, and writes all three, 6 times the bytes of the model. Its time is compared with that of copies of as many
bytes on the same device. Over MPI, which takes no arrays on a device unless it is CUDA-aware, the parameters are copied
to pinned host memory and back. These copies are compared with PyTorch's own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_timing import parse, take_turns, where, write_json
from measuring import Sample, report, table

import lentando.torch as lt
from lentando.comm.capabilities import takes_device_arrays
from lentando.comm.flat import Entry, FlatLayout
from lentando.comm.process_sets import global_process_set, transport_of
from lentando.torch.flat_memory import FlatMemory

PASSES = 6
"""Times that an outer step must read or write the bytes of the model."""
NEVER = 10**9
LAYERS, WIDTH = 31, 2000
"""Of a model of 124 million parameters."""
CALLS = 5
"""In a measurement."""


def trained_with(period: int, device: torch.device, small: bool) -> tuple[Callable[[], object], int]:
    """The step of an optimizer whose gradients are zero, and the bytes of the model."""
    width = 20 if small else WIDTH
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS))).to(device)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=period)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return optimizer.step, sum(parameter.nbytes for parameter in model.parameters())


def copies_on_device(device: torch.device, elements: int) -> dict[str, Callable[[], object]]:
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return {"copy on the device": lambda: target.copy_(source)}


def copies_through_host(device: torch.device, elements: int) -> dict[str, Callable[[], object]]:
    """The copies of a model that is sent through host memory, and PyTorch's own to and from pinned memory."""
    entry = Entry("weights", (elements,), "float32", 0)
    memory = FlatMemory(FlatLayout([entry]), device, "staged", shared=False)
    host, flat = torch.zeros(elements, pin_memory=device.type == "cuda"), torch.zeros(elements, device=device)
    return {
        "to the host": memory.load,
        "to the host, PyTorch alone": lambda: host.copy_(flat),
        "from the host": memory.store,
        "from the host, PyTorch alone": lambda: flat.copy_(host),
    }


def main() -> None:
    options = parse(__doc__, repeats=7)
    device = options.device
    lt.init()
    transport = transport_of(global_process_set)
    is_direct = takes_device_arrays(transport) and device.type == "cuda"
    every_step, size = trained_with(1, device, options.dry_run)
    between, _ = trained_with(NEVER, device, options.dry_run)
    elements = size // np.dtype(np.float32).itemsize
    cases: dict[str, Callable[[], Any]] = {"step with an outer step": every_step, "step without": between}
    cases |= copies_on_device(device, elements)
    if not is_direct:
        cases |= copies_through_host(device, elements)
    found = take_turns(device, cases, options.repeats, CALLS)

    with_outer, without, copy = list(found.values())[:3]
    outer = Sample(tuple(own - bare for own, bare in zip(with_outer.seconds, without.seconds, strict=True)))
    floor = Sample(tuple(PASSES / 2 * seconds for seconds in copy.seconds))
    rows = [
        ["outer step alone", str(outer), f"{PASSES * size / outer.median / 1e9:.1f}"],
        [f"copies of {PASSES} times the model's bytes", str(floor), f"{2 * size / copy.median / 1e9:.1f}"],
    ]
    rows += [[name, str(sample), f"{size / sample.median / 1e9:.1f}"] for name, sample in list(found.items())[3:]]
    passes = outer.median / floor.median
    sent = "as they are" if is_direct else "through host memory"
    caption = (
        f"A model of {size / 1e6:.0f} MB in float32 on one rank over {transport.name}, which sends parameters {sent}. "
        f"Median and quartiles of {options.repeats} measurements in turn. An outer step takes {passes:.2f} times as "
        f"long as copies of the bytes that it must read and write. {where(options)}"
    )
    report(f"{table(['', 'time', 'GB/s'], rows)}\n\n{caption}", options.markdown)
    figures = {name: sample.seconds for name, sample in {**found, "outer step alone": outer}.items()}
    write_json(
        options.json,
        {"outer_step": {"transport": transport.name, "model_bytes": size, "of_its_bytes": passes, "seconds": figures}},
    )
    lt.shutdown()


if __name__ == "__main__":
    main()
