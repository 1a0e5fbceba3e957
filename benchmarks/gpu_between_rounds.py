"""What SlowMo costs on a GPU in the steps that do not communicate, over the bare optimizer.

    python benchmarks/gpu_between_rounds.py
    python benchmarks/gpu_between_rounds.py --dry-run       without a GPU: shows that the program works

ResNet-50 (images of 32 x 32) with SGD, and a GPT of 124 million parameters with AdamW, forward and backward pass in
bfloat16. Each is trained by the optimizer's defaults, with ``fused=True``, and with both passes captured as a CUDA
graph. Bare and wrapped optimizer train models of their own in turn. The first table shows the time of an iteration and
how long ``step()`` keeps the host; the second how often the host waited for the device in those steps, from a trace of
PyTorch's profiler, and the memory that the wrapper takes on the device.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import parse, take_turns, wait, where, write_json
from gpu_workloads import GPT, RESNET, Workload
from measuring import report, table

import lentando.torch as lt

NEVER = 10**9
"""A period that lies beyond the end: what is timed sends nothing."""
ITERATIONS = 10
"""Of a measurement."""
DEFAULTS, FUSED, GRAPH = "defaults", "fused=True", "CUDA graph"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")
"""Calls of CUDA in which the host waits."""


class Trainer:
    """Trains one model, by the bare optimizer or by SlowMo between its rounds."""

    def __init__(self, name: str, setting: str, device: torch.device, small: bool, *, wrapped: bool) -> None:
        before = allocated(device)
        self.workload = Workload(name, device, small)
        self.optimizer: Any = self.workload.optimizer(fused=setting == FUSED)
        if wrapped:
            self.optimizer = lt.SlowMo(self.optimizer, model=self.workload.model, period=NEVER)
        self.compute: Callable[[], object] = self._compute
        self.step_seconds: list[float] = []
        for _ in range(3):  # the gradients' memory, the optimizer's, and the choice of kernels
            self.iterate()
        if setting == GRAPH and device.type == "cuda":
            self.compute = captured(self._compute)
        wait(device)
        self.bytes = allocated(device) - before

    def iterate(self) -> None:
        self.compute()
        started = time.perf_counter()
        self.optimizer.step()
        self.step_seconds.append(time.perf_counter() - started)

    def _compute(self) -> None:
        self.optimizer.zero_grad()
        self.workload.compute()


def captured(compute: Callable[[], object]) -> Callable[[], object]:
    """Capture forward and backward pass as a CUDA graph, after passes on another stream, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay


def allocated(device: torch.device) -> int:
    """Bytes on the device that PyTorch and CuPy have handed out."""
    if device.type != "cuda":
        return 0
    import cupy

    pool: int = cupy.get_default_memory_pool().used_bytes()
    return pool + torch.cuda.memory_allocated(device)


def waits(trainer: Trainer, device: torch.device, iterations: int) -> dict[str, int]:
    """Calls of CUDA in which the host waits, in iterations between rounds, from a trace of PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(iterations):
            trainer.iterate()
    found = Counter(event.name for event in profiler.events() or () if event.name in WAITS)
    return dict(found)


def main() -> None:
    options = parse(__doc__, repeats=7)
    device, small = options.device, options.dry_run
    lt.init()
    iterations = 1 if small else ITERATIONS
    times, waited, figures = [], [], []
    for name in (RESNET, GPT):
        for setting in (DEFAULTS, FUSED, GRAPH):
            bare, wrapped = (Trainer(name, setting, device, small, wrapped=wrapped) for wrapped in (False, True))
            cases = {"bare": bare.iterate, "wrapped": wrapped.iterate}
            found = take_turns(device, cases, options.repeats, iterations)
            steps = [1e6 * statistics.median(trainer.step_seconds) for trainer in (bare, wrapped)]
            copies = (wrapped.bytes - bare.bytes) / bare.workload.model_bytes
            counts = [waits(trainer, device, iterations) for trainer in (bare, wrapped)]
            ratio = found["wrapped"].times_faster_than(found["bare"]) ** -1
            shown = [str(sample) for sample in found.values()]
            times.append(
                [name, setting, *shown, f"{100 * (ratio - 1):.2f} %", f"{steps[0]:.0f}", f"{steps[1] - steps[0]:.0f}"]
            )
            waited.append([name, setting, *(str(sum(count.values())) for count in counts), f"{copies:.2f}"])
            figures.append(
                {
                    "model": name,
                    "setting": setting,
                    "bare_seconds": found["bare"].seconds,
                    "wrapped_seconds": found["wrapped"].seconds,
                    "added_percent": 100 * (ratio - 1),
                    "bare_step_us": steps[0],
                    "wrapped_step_us": steps[1],
                    "bare_waits": counts[0],
                    "wrapped_waits": counts[1],
                    "copies": copies,
                }
            )
            del bare, wrapped, cases
            if device.type == "cuda":
                torch.cuda.empty_cache()
    header = ["model", "optimizer", "iteration, bare", "by SlowMo", "longer", "bare step() (us)", "SlowMo adds (us)"]
    text = table(header, times)
    header = ["model", "optimizer", "the host waits, bare", "by SlowMo", "copies of the model"]
    text += (
        f"\n\nMedian and quartiles of {options.repeats} measurements in turn, {iterations} iterations each, from an "
        "idle device to an idle device. step(): the host's time, median.\n\n"
        f"{table(header, waited)}\n\nWaits of the host in {iterations} iterations (one is the profiler's own). Copies: "
        f"memory on the device beyond that of the bare optimizer. {where(options)}"
    )
    report(text, options.markdown)
    write_json(options.json, {"between_rounds": figures})
    lt.shutdown()


if __name__ == "__main__":
    main()
