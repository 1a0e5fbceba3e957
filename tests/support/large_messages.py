"""Messages, collectives, objects and a model beyond 2 GiB, by hand: some 10 GB of memory, a minute or two.

    mpirun -np 2 python tests/support/large_messages.py
    mpirun -np 2 python tests/support/large_messages.py --gib 0.1 --only model

Prints a line for each operation that moved what it should, and ends with status 1 at the first that did not.
``tests/ranks/comm/test_large_messages.py`` tests the same with a low limit.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from lentando.comm import world
from lentando.comm.collectives import all_reduce
from lentando.comm.objects import broadcast_object
from lentando.comm.transport import Array

PERIOD = 61
BLOCK = 133_000 * PERIOD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.1, help="of the longest buffer (2.1)")
    parser.add_argument("--only", choices=[*OPERATIONS], action="append", help="operations (all)")
    options = parser.parse_args()
    world.init()
    for name in options.only or OPERATIONS:
        started = time.perf_counter()
        size_bytes = OPERATIONS[name](int(options.gib * 2**30))
        world.transport().barrier()
        if world.rank() == 0:
            print(f"{name}: {size_bytes / 2**30:.2f} GiB in {time.perf_counter() - started:.1f} s", flush=True)


def exchange(size_bytes: int) -> int:
    """Every rank sends to the next, in pieces and as a neighbour."""
    transport = world.transport()
    following, previous = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    sent, received = pattern(size_bytes, transport.rank), np.zeros(size_bytes, np.uint8)
    transport.exchange([(following, sent)], [(previous, received)]).wait()
    check(received, previous)
    return size_bytes


def broadcast(size_bytes: int) -> int:
    array = pattern(size_bytes, world.rank())
    world.transport().broadcast(array, world.size() - 1)
    check(array, world.size() - 1)
    return size_bytes


def allgather(size_bytes: int) -> int:
    """What comes out is beyond the limit, what each rank brings is not: that would be too much for one machine."""
    gathered = world.transport().allgather(pattern(size_bytes // 2, world.rank()))
    for rank, array in enumerate(gathered):
        check(array, rank)
    return gathered.nbytes


def total(size_bytes: int) -> int:
    """More elements than an int counts."""
    array = pattern(size_bytes, 0)
    all_reduce(world.transport(), array, algorithm="backend")
    check(array, 0, world.size())
    return size_bytes


def ring(size_bytes: int) -> int:
    array = pattern(size_bytes, 0)
    all_reduce(world.transport(), array, algorithm="ring")
    check(array, 0, world.size())
    return size_bytes


def broadcast_of_an_object(size_bytes: int) -> int:
    """A quarter: encoding and decoding make copies."""
    value = {"weights": pattern(size_bytes // 4, 0)} if world.rank() == 0 else None
    found = broadcast_object(world.transport(), value)["weights"]
    check(found, 0)
    return int(found.nbytes)


def model(size_bytes: int) -> int:
    """A parameter of 2 GiB is wrapped, which broadcasts it."""
    import torch

    import lentando.torch as lt

    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.full((size_bytes // 4,), float(lt.rank() + 1)), requires_grad=True)
    lt.SlowMo(torch.optim.SGD(module.parameters(), 1.0, foreach=False), model=module, period=2, slow_momentum=0.5)
    with torch.no_grad():
        assert bool((module.w == 1.0).all())
    return size_bytes


OPERATIONS: dict[str, Callable[[int], int]] = {
    "exchange": exchange,
    "broadcast": broadcast,
    "allgather": allgather,
    "total": total,
    "ring": ring,
    "object": broadcast_of_an_object,
    "model": model,
}


def blocks(size_bytes: int, rank: int, factor: int) -> Iterator[tuple[slice, Array]]:
    """What belongs where: a period that is no power of two, so that what is displaced differs.

    Small numbers, whose sums over four ranks fit in a byte.
    """
    block = (((np.arange(BLOCK, dtype=np.int64) + 7 * rank) % PERIOD) * factor).astype(np.uint8)
    for start in range(0, size_bytes, BLOCK):
        stop = min(start + BLOCK, size_bytes)
        yield slice(start, stop), block[: stop - start]


def pattern(size_bytes: int, rank: int) -> Array:
    array: Array = np.empty(size_bytes, np.uint8)
    for place, block in blocks(size_bytes, rank, 1):
        array[place] = block
    return array


def check(array: Array, rank: int, factor: int = 1) -> None:
    for place, block in blocks(array.size, rank, factor):
        if not np.array_equal(array[place], block):
            first = int((array[place] != block).argmax())
            sys.exit(f"rank {world.rank()}: element {place.start + first} is {array[place][first]}, not {block[first]}")


if __name__ == "__main__":
    main()
