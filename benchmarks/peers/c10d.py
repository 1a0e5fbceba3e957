"""One rank of a job that times all-reduces and DistributedDataParallel over one backend of torch.distributed.

    mpirun -np 2 python benchmarks/peers/c10d.py lentando
    torchrun --nproc-per-node 2 benchmarks/peers/c10d.py gloo

``benchmarks/run.py c10d`` starts such jobs in turn. The backends differ in the name that ``init_process_group`` gets.
Horovod trains the same models by its own DistributedOptimizer. All settings are the defaults. Prints a line of JSON:
for each figure, seconds on the slowest rank, of one all-reduce or one iteration.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from horovod_loops import SCALE, resnet50_shapes
from horovod_loops import Model as Shapes
from iterations import Model, sgd, training
from operations import SAMPLES, Horovod, TorchDistributed, finish, median_seconds
from torch import nn

LIBRARIES: dict[str, Callable[[], Any]] = {
    "lentando": lambda: TorchDistributed("lentando"),
    "gloo": lambda: TorchDistributed("gloo"),
    "horovod": Horovod,
}
ITERATION_SECONDS = 0.7
"""How long the iterations of a loop take together, at least."""


def data_parallel(library: str, model: nn.Module) -> tuple[nn.Module, Any]:
    """What a script trains, and by which optimizer."""
    if library != "horovod":
        parallel = nn.parallel.DistributedDataParallel(model)
        return parallel, sgd(parallel)
    import horovod.torch as hvd

    return model, hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters())


def multiplies(model: nn.Module, optimizer: Any) -> Callable[[], object]:
    def step() -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    return step


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="bytes of the buffers that are all-reduced")
    parser.add_argument("--layers", type=int, default=24, help="of 1 MB in the model (default %(default)s)")
    parser.add_argument("--compute-seconds", type=float, default=0.0, help="what an iteration of it sleeps besides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = LIBRARIES[options.library]()
    torch.manual_seed(1)
    loops: dict[str, Callable[[], object]] = {}
    for name, make, loop in (
        ("layers", lambda: Model(options.layers, options.compute_seconds), training),
        ("160 tensors", lambda: Shapes(list(resnet50_shapes(SCALE))), multiplies),
    ):
        alone = make()
        loops[f"{name}, compute alone"] = loop(alone, sgd(alone))
        loops[name] = loop(*data_parallel(options.library, make()))
    found = {}
    for size in options.sizes:
        found[f"all_reduce:{size}"] = median_seconds(library, library.all_reduce(size // 4))
    for name, step in loops.items():
        found[name] = median_seconds(library, step, ITERATION_SECONDS / SAMPLES)
    finish(options.library, library, found)


if __name__ == "__main__":
    main()
