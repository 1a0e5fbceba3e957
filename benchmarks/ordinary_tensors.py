"""All-reduce of ordinary tensors, as Horovod's users call it, against MPI_Allreduce and Gloo in the same processes.

    mpirun -np 2 python benchmarks/ordinary_tensors.py
    mpirun -np 4 python benchmarks/ordinary_tensors.py --sizes 25MB

The tensors lie in ordinary memory. A ratio above 1 means that Lentando was faster than the faster of the two peers.
"""

import argparse
import platform
from collections.abc import Callable

import torch
import torch.distributed as dist
from all_reduce import MPI_ALLREDUCE, in_words, numbers_of_bytes
from measuring import Sample, facts, measure, parse, report, table
from mpi4py import MPI
from tqdm import tqdm

import lentando.torch as lt

IN_PLACE, IN_BACKGROUND, GLOO = "allreduce_", "allreduce_async_, synchronize", "Gloo"
OURS = (IN_PLACE, IN_BACKGROUND)


def cases(comm: MPI.Intracomm, size: int) -> dict[str, Callable[[], object]]:
    """The same sum of the same tensor by each library. Zeros stay zeros, however often they are summed."""
    tensor = torch.zeros(size // 4)
    return {
        MPI_ALLREDUCE: lambda: comm.Allreduce(MPI.IN_PLACE, tensor.numpy()),
        GLOO: lambda: dist.all_reduce(tensor),
        IN_PLACE: lambda: lt.allreduce_(tensor, op=lt.Sum, name="tensor"),
        IN_BACKGROUND: lambda: lt.synchronize(lt.allreduce_async_(tensor, op=lt.Sum, name="tensor")),
    }


def row(size: int, found: dict[str, Sample]) -> list[str]:
    best = min((MPI_ALLREDUCE, GLOO), key=lambda name: found[name].median)
    ratios = [f"{found[name].times_faster_than(found[best]):.2f}" for name in OURS]
    return [in_words(size), *map(str, found.values()), *ratios]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        type=numbers_of_bytes,
        default="1MB,25MB,100MB",
        help="sizes of the float32 tensor (default %(default)s)",
    )
    options = parse(parser, repeats=9, several_ranks=True)

    comm = MPI.COMM_WORLD
    lt.init()
    torch.set_num_threads(1)
    store = dist.TCPStore(comm.bcast(platform.node()), 29_482, comm.size, comm.rank == 0)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    where = facts(comm)
    rows = []
    with tqdm(total=4 * len(options.sizes) * options.repeats, disable=comm.rank != 0, leave=False) as progress:
        for size in options.sizes:
            progress.set_description(in_words(size))
            rows.append(row(size, measure(comm, cases(comm, size), options.repeats, progress)))
    if comm.rank == 0:
        names = MPI_ALLREDUCE, GLOO, *OURS
        header = ["float32 tensor", *names, *(f"{name} ratio" for name in OURS)]
        caption = (
            f"{where}; torch {torch.__version__}. Median and quartiles of {options.repeats} measurements in turn. "
            "Ratio: the faster peer / Lentando, median of the pairs; above 1 Lentando is faster."
        )
        report(f"{table(header, rows)}\n\n{caption}", options.markdown)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
