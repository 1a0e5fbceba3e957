"""``simulate``: assemble a simulation and run it."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter, signature
from math import inf
from random import Random
from typing import Any

from lentando.comm.cluster import Compute, Network
from lentando.comm.errors import ConfigurationError
from lentando.comm.simulation.collectives import Collectives
from lentando.comm.simulation.faults import Fault, MessageFaults, RankFault, RankFaults
from lentando.comm.simulation.membership import ElasticTransport, Membership
from lentando.comm.simulation.messages import Mail, Sent
from lentando.comm.simulation.process_state import IsolatedRanks
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.step_times import StepTimes
from lentando.comm.simulation.transport import SimulatedTransport
from lentando.comm.simulation.wires import Wires
from lentando.comm.world import simulated_rank

__all__ = ["simulate"]

DEFAULT_NETWORK = Network()
DEFAULT_COMPUTE = Compute()


def simulate(
    worker: Callable[..., Any],
    size: int,
    *,
    network: Network = DEFAULT_NETWORK,
    compute: Compute = DEFAULT_COMPUTE,
    seed: int = 0,
    faults: Sequence[Fault] = (),
    notice_seconds: float | None = None,
    local_size: int = 1,
    isolate: bool | None = None,
    check_buffers: bool = True,
    observe: Callable[[Sent], None] | None = None,
) -> list[Any]:
    """Run ``worker`` on ``size`` virtual ranks in this process, in virtual time, identically on every run.

    On each rank, ``lentando.comm.world`` refers to that rank, ``init()`` and ``shutdown()`` included, so a training
    program runs unchanged. The rank whose clock is lowest runs, lower ranks first, until it waits or advances its
    clock.

    Ranks share everything that the threads of a process share, such as global variables and files. Virtual time passes
    only in messages, in collectives, and in training steps, for which optimizers charge ``compute``. Other code takes
    none.

    Args:
        worker: function that each rank runs: ``worker(transport)`` if it has a parameter without a default, else
            ``worker()``.
        size: number of ranks, >= 1.
        network: network model.
        compute: model of the compute time of training steps.
        seed: seed of all randomness in the models. The same seed gives the same run.
        faults: faults that occur.
        notice_seconds: makes the transports ``Elastic``: so long after the death of a rank, the others get a
            ``RankLostError``, and can continue without it. If None, ranks that wait for a dead rank wait forever.
        local_size: number of ranks per node: rank r is on node r // local_size. The last node may have fewer.
        isolate: whether each rank has its own state of the global random generators of Python, NumPy, the imported
            frameworks, and those registered by ``register_process_state``, as separate processes have. By default True
            if ``worker`` takes no parameter, since a whole program may use them.
        check_buffers: whether arrays to be received are filled with 0xFF until their message arrives, and an array
            that is changed while it is sent is an error. This finds code that works only with some MPI libraries.
        observe: called with each message (``Sent``) when it is sent; ``log.append``, for example.

    Returns:
        return values of ``worker``, by rank; None for a rank that died.

    Raises:
        SimulationError: if a rank raised an exception, which is the cause; names the rank.
        DeadlockError: if ranks wait forever; names the ranks, what they wait for, and at which line.
        ConfigurationError: for values outside these ranges.

    Example:
        >>> import numpy as np
        >>> from lentando.comm.simulation import Network, simulate
        >>> def worker(transport):
        ...     array = np.full(25_000_000, transport.rank, np.float32)
        ...     transport.allreduce(array)
        ...     return float(array[0]), round(transport.clock(), 4)
        >>> simulate(worker, 4, network=Network(latency_seconds=50e-6, bandwidth_bytes_per_second=1.25e9))
        [(6.0, 0.1202), (6.0, 0.1202), (6.0, 0.1202), (6.0, 0.1202)]
    """
    _check(size, local_size, compute, faults, notice_seconds)
    takes_transport = _needs_argument(worker)
    isolated = IsolatedRanks(seed) if (not takes_transport if isolate is None else isolate) else None
    scheduler = Scheduler(isolated.enter if isolated is not None else None)
    wires = Wires(network, size, local_size, seed)
    mail = Mail(scheduler, wires, network, MessageFaults(faults, seed), check_buffers, observe)
    collectives = Collectives(scheduler, wires, scheduler.tasks)
    membership: Membership | None = None
    if notice_seconds is not None:
        chance = Random(f"crew {seed}")  # check_words: allow - another seed would be another run
        membership = Membership(scheduler, mail, wires, notice_seconds, local_size, chance)

    def run_worker(transport: SimulatedTransport) -> Any:
        with simulated_rank(transport):
            return worker(transport) if takes_transport else worker()

    for rank in range(size):
        rank_faults = RankFaults(faults, rank)
        times = StepTimes(compute, rank, seed, rank_faults.slowness)
        kind = SimulatedTransport if membership is None else ElasticTransport
        transport = kind(rank, size, local_size, scheduler, mail, collectives, times, rank_faults)
        transport.bind(scheduler.add(partial(run_worker, transport)))
        if membership is not None and isinstance(transport, ElasticTransport):
            transport.join(membership)
        if rank_faults.dies_at_seconds is not None:
            scheduler.kill(scheduler.tasks[rank], rank_faults.dies_at_seconds)
    if membership is not None:
        membership.begin()
    try:
        scheduler.run()
    finally:
        if isolated is not None:
            isolated.leave()
    return [task.result for task in scheduler.tasks]


def _needs_argument(worker: Callable[..., Any]) -> bool:
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature(worker).parameters.values() if p.kind in positional and p.default is Parameter.empty]
    if len(needed) > 1:
        names = ", ".join(parameter.name for parameter in needed)
        raise ConfigurationError(
            f"a worker takes the transport or nothing, but this one needs {names}: bind the other parameters "
            "with functools.partial"
        )
    return bool(needed)


def _check(size: int, local_size: int, compute: Compute, faults: Sequence[Fault], notice_seconds: float | None) -> None:
    if notice_seconds is not None and not 0 <= notice_seconds < inf:
        raise ConfigurationError(f"notice_seconds must be finite and >= 0, got {notice_seconds}")
    if size < 1 or local_size < 1:
        raise ConfigurationError(f"size and local_size must be >= 1, got size={size}, local_size={local_size}")
    named = [("stragglers", rank) for rank in compute.stragglers]
    for fault in faults:
        if isinstance(fault, RankFault):
            named.append((f"{fault}", fault.rank))
        else:
            named += [(f"{fault}", rank) for rank in (fault.sender, fault.receiver) if rank is not None]
    for setting, rank in named:
        if not 0 <= rank < size:
            raise ConfigurationError(f"{setting}: there is no rank {rank}, expected 0 to {size - 1}")
