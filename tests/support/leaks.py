"""Makes and drops wrappers, collectives of new tensors, checkpoints and transports for long, and looks for leaks.

    mpirun -np 2 python tests/support/leaks.py --minutes 15
    mpirun -np 2 python tests/support/leaks.py --minutes 15 --framework tensorflow

Prints what each rank holds once a minute (ten times, if it runs for less than ten). The first third of the time is for
caches to fill. Ends with status 1 if anything grows after that.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lentando.comm import world
from lentando.comm.objects import allgather_object, broadcast_object

LEAST_TURNS = 30
"""However short the time is: every kind of wrapper, and checkpoints, in each third of it, on a slow machine too."""
ALLOWED = {"memory_bytes": (4 * 2**20, 0.01), "mappings": (2, 0.02), "communicators": (16, 0.0)}
"""By name of what is held, how much more there may be, in all and as a share: allocators keep more or less, and a pool
of communicators grows once more where one more wrapper lives at the same time."""


@dataclass(frozen=True)
class Held:
    """What a process holds.

    Attributes:
        memory_bytes: resident.
        descriptors: open files, memory shared with neighbours included.
        mappings: of memory, those of neighbours included.
        threads: of the process, those of MPI included.
        communicators: the number that MPI gives to a new one, which is the lowest that is free.
    """

    memory_bytes: int
    descriptors: int
    mappings: int
    threads: int
    communicators: int


def held() -> Held:
    """What this process holds now, once all that is garbage is collected."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    communicators = 0
    if "mpi4py.MPI" in sys.modules:
        probe = sys.modules["mpi4py.MPI"].COMM_SELF.Dup()
        communicators = probe.py2f() & 0x3FFFFFF  # MPICH writes the kind of a handle into its first bits
        probe.Free()
    return Held(
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        len(list(Path("/proc/self/fd").iterdir())),
        Path("/proc/self/maps").read_text().count("\n"),
        len(list(Path("/proc/self/task").iterdir())),
        communicators,
    )


def torch_iteration(folder: Path) -> Callable[[int], None]:
    """One turn of everything, with PyTorch. Takes its number."""
    import torch

    import lentando.torch as lt

    bases: list[Callable[[], Any]] = [lambda: lt.AllReduce(overlap=True), lt.LocalSGD, lt.SGP, lt.OSGP, lt.AllReduce]

    def turn(number: int) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(32, 16 + number % 7), torch.nn.Linear(16 + number % 7, 600))
        base = bases[number % len(bases)]()
        inner = torch.optim.Adam(model.parameters(), 1e-3)
        outer = {} if isinstance(base, lt.AllReduce) else {"period": 2}
        optimizer = lt.DistributedOptimizer(inner, model=model, base=base, **outer)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.full((2, 32), lt.rank() + 1.0)).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
        with optimizer.averaged():
            model(torch.ones(1, 32))
        lt.allreduce(torch.ones(number % 100 + 1), name=f"tensor {number}")
        lt.allgather(torch.ones(lt.rank() + number % 50))
        lt.broadcast_object({"number": number, "tensor": torch.ones(number % 1000)})
        lt.broadcast_parameters(model.state_dict(), 0)
        if number % 5 == 0:
            lt.save(folder / "run", optimizer, extra={"number": number})
            lt.load(folder / "run", optimizer)
        another_transport()

    return turn


def tensorflow_iteration(folder: Path) -> Callable[[int], None]:
    """The same with Keras, of which each model leaves a little behind that is not ours: it makes few."""
    import keras
    import tensorflow as tf

    import lentando.tensorflow as lt

    model = keras.Sequential([keras.layers.Input((32,)), keras.layers.Dense(64), keras.layers.Dense(600)])
    images, labels = tf.fill([2, 32], lt.rank() + 1.0), tf.zeros([2, 600])

    def turn(number: int) -> None:
        inner = keras.optimizers.SGD(1e-3)
        if number % 2:
            optimizer = lt.SlowMo(inner, model=model, period=2, slow_momentum=0.5)
        else:
            optimizer = lt.DistributedOptimizer(inner, model=model)
        for _ in range(4):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(images) - labels))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables, loss=loss)
        lt.allreduce(tf.ones([number % 100 + 1]), name=f"tensor {number}")
        lt.allgather(tf.ones([lt.rank() + number % 50]))
        lt.broadcast_object({"number": number, "tensor": tf.ones([number % 1000])})
        if number % 5 == 0:
            lt.save(folder / "run", optimizer, extra={"number": number})
            lt.load(folder / "run", optimizer)
        another_transport()

    return turn


def another_transport() -> None:
    """A transport of its own for the same ranks, as a program that has several jobs in a row makes."""
    if world.transport().name != "mpi":
        return
    from lentando.comm.transports.mpi import MPITransport

    other = MPITransport()
    other.allreduce(np.ones(10))
    other.close()


ITERATIONS = {"torch": torch_iteration, "tensorflow": tensorflow_iteration}


def growth(samples: Sequence[Held]) -> list[str]:
    """What has grown between the second and the last third of the samples."""
    third = max(1, len(samples) // 3)
    middle, last = samples[third : 2 * third] or samples[:1], samples[-third:]
    found = []
    for field in fields(Held):
        before = median(getattr(sample, field.name) for sample in middle)
        after = median(getattr(sample, field.name) for sample in last)
        more, share = ALLOWED.get(field.name, (2, 0.0))
        if after > before + more + share * before:
            found.append(f"{field.name} grew from {before:.0f} to {after:.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="how long (15)")
    parser.add_argument("--framework", choices=[*ITERATIONS], default="torch")
    options = parser.parse_args()
    world.init()
    transport = world.transport()
    shared = broadcast_object(transport, tempfile.mkdtemp(prefix="lentando-leaks-") if transport.rank == 0 else None)
    turn = ITERATIONS[options.framework](Path(shared))
    began = time.monotonic()
    pause_seconds = min(60.0, 6.0 * options.minutes)
    samples: list[Held] = []
    number, is_over = 0, False
    while not is_over:
        turn(number)
        number += 1
        spent = time.monotonic() - began
        is_sampled = spent >= pause_seconds * (len(samples) + 1)
        is_over = spent >= 60 * options.minutes and number >= LEAST_TURNS
        is_sampled, is_over = broadcast_object(transport, [is_sampled, is_over])
        if is_sampled or is_over:
            samples.append(held())
            by_rank = allgather_object(transport, list(astuple(samples[-1])))
            if transport.rank == 0:
                print(f"{spent:6.0f} s, {number} turns: {'; '.join(map(in_words, by_rank))}", flush=True)
    grown = allgather_object(transport, growth(samples))
    if transport.rank == 0:
        for path in sorted(Path(shared).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Path(shared).rmdir()
        for rank, words in enumerate(grown):
            print(f"rank {rank}: {'; '.join(words) or 'nothing grew'}", flush=True)
    transport.barrier()
    if any(grown):
        sys.exit(1)


def in_words(numbers: Sequence[int]) -> str:
    memory_bytes, *others = numbers
    names = [field.name for field in fields(Held)][1:]
    counts = ", ".join(f"{count} {name}" for count, name in zip(others, names, strict=True))
    return f"{memory_bytes / 2**20:.1f} MiB, {counts}"


if __name__ == "__main__":
    main()
