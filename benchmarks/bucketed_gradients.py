"""The share of gradient averaging that the backward pass hides: without overlap, in buckets, and by PyTorch's DDP.

    mpirun -np 2 python benchmarks/bucketed_gradients.py
    sudo python benchmarks/cluster run --hosts 4 -- mpirun -np 4 python benchmarks/bucketed_gradients.py

A stack of equal layers learns noise. By default each layer sleeps in addition to its computation, to emulate a device
where ranks do not share cores; the total time is that of an average without overlap. ``--busy`` computes for that time
instead, so that overlap needs a spare core. DDP uses Gloo, in the same processes, with its default buckets and with
others.
"""

import argparse
import os
import platform
import statistics
import sys
from functools import partial

import torch
import torch.distributed as dist
from all_reduce import in_words
from measuring import facts, measure, parse, report, table
from mpi4py import MPI
from overlap import matrix_products
from peers.iterations import DDP_BUCKETS, Model, sgd, training
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import lentando.torch as lt

LAYER_BYTES = 512 * 512 * 4
ALONE, AT_ONCE, IN_BUCKETS = "compute alone", "AllReduce(overlap=False)", "AllReduce(overlap=True)"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of 1 MB each (default %(default)s)")
    parser.add_argument("--busy", action="store_true", help="compute instead of sleeping")
    options = parse(parser, repeats=7, several_ranks=True)

    comm = MPI.COMM_WORLD
    lt.init()
    where = facts(comm)
    torch.manual_seed(1)
    torch.set_num_threads(1)
    store = dist.TCPStore(comm.bcast(platform.node()), 29_481, comm.size, comm.rank == 0)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)

    def wrapped(model: torch.nn.Module, **options: object) -> lt.DistributedOptimizer:
        return lt.DistributedOptimizer(sgd(model), model=model, base=lt.AllReduce(**options))  # type: ignore[arg-type]

    quick, bare = Model(options.layers, 0.0), Model(options.layers, 0.0)
    setting_out = {ALONE: training(bare, sgd(bare)), AT_ONCE: training(quick, wrapped(quick, overlap=False))}
    found = measure(comm, setting_out, 3)
    seconds = comm.bcast(found[AT_ONCE].median - found[ALONE].median)
    products = matrix_products(comm, seconds / 3 / options.layers) if options.busy else None
    make = partial(Model, options.layers, seconds, products)
    alone, at_once, in_buckets = make(), make(), make()
    cases = {
        ALONE: training(alone, sgd(alone)),
        AT_ONCE: training(at_once, wrapped(at_once, overlap=False)),
        IN_BUCKETS: training(in_buckets, wrapped(in_buckets, overlap=True)),
    }
    for name, buckets in DDP_BUCKETS.items():
        parallel = DistributedDataParallel(make(), **buckets)
        cases[name] = training(parallel, sgd(parallel))
    with tqdm(total=options.repeats * len(cases), disable=comm.rank != 0, leave=False) as progress:
        found = measure(comm, cases, options.repeats, progress)
    if comm.rank == 0:
        rows = []
        for name, sample in found.items():
            in_turn = zip(sample.seconds, found[ALONE].seconds, found[AT_ONCE].seconds, strict=True)
            exposed = statistics.median((own - bare) / (whole - bare) for own, bare, whole in in_turn)
            ours = f"{found[IN_BUCKETS].times_faster_than(sample):.2f}"
            rows.append([name, str(sample), "" if name == ALONE else f"{100 * exposed:.0f} %", ours])
        what = "computing" if options.busy else "sleeping"
        caption = (
            f"{in_words(options.layers * LAYER_BYTES)} of gradients, "
            f"{1e3 * seconds:.0f} ms of {what}; {where}; PyTorch {torch.__version__}. Median and quartiles of "
            f"{options.repeats} measurements in turn. Seen: what averaging adds, of what it adds at the end."
        )
        report(
            f"{table(['what', 'iteration', 'seen', 'times faster in buckets'], rows)}\n\n{caption}", options.markdown
        )
        sys.stdout.flush()
    comm.Barrier()
    lt.shutdown()
    MPI.Finalize()
    os._exit(0)  # Gloo's threads may log errors after their store is closed


if __name__ == "__main__":
    main()
