"""``simulate``: put the parts of a simulation together and run it."""

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

    On each rank, ``lentando.comm.world`` speaks of that rank, ``init()`` and ``shutdown()`` included: a training
    function runs unchanged. The rank whose clock is lowest runs, lower ranks first, until it waits or lets time pass.

    Ranks share what threads of one process share: global variables and files. Time passes only where the models say
    so: code between two calls takes none, except that whoever counts training steps charges ``compute`` for each.

    Args:
        worker: called as ``worker(transport)`` if it has a parameter without a default, else as ``worker()``.
        size: number of ranks, >= 1.
        network: how long messages take.
        compute: how long training steps take.
        seed: of everything random in the models. Another seed is another run.
        faults: what goes wrong.
        notice_seconds: makes the ranks' transports ``Elastic``: those that live are told of a death so long after it,
            and can go on. Without it, who waits for the dead waits forever.
        local_size: ranks per node: rank r is on node r // local_size; the last node may have fewer.
        isolate: whether each rank has its own state of Python's, NumPy's and registered global random generators, as
            processes have. By default if ``worker`` takes no parameter: then it is a program, which may use them.
        check_buffers: fill arrays that a receive is to fill with 0xFF, and raise if an array is changed while it is
            sent: finds what works with one MPI by luck. Costs little.
        observe: called with every message when it is sent; ``log.append``, for example.

    Returns:
        what ``worker`` returned, by rank; None for a rank that died.

    Raises:
        SimulationError: if a rank raised; names it. The exception is the cause.
        DeadlockError: if ranks wait forever; names them, what they wait for, and where.
        ConfigurationError: for settings that cannot be.
    """
    _check(size, local_size, compute, faults, notice_seconds)
    takes_transport = _needs_argument(worker)
    isolated = IsolatedRanks(seed) if (not takes_transport if isolate is None else isolate) else None
    scheduler = Scheduler(isolated.enter if isolated is not None else None)
    wires = Wires(network, size, local_size, seed)
    mail = Mail(scheduler, wires, network, MessageFaults(faults, seed), check_buffers, observe)
    collectives = Collectives(scheduler, wires, scheduler.tasks)
    crew: Membership | None = None
    if notice_seconds is not None:
        crew = Membership(scheduler, mail, wires, notice_seconds, local_size, Random(f"crew {seed}"))

    def live(transport: SimulatedTransport) -> Any:
        with simulated_rank(transport):
            return worker(transport) if takes_transport else worker()

    for rank in range(size):
        own = RankFaults(faults, rank)
        times = StepTimes(compute, rank, seed, own.slowness)
        kind = SimulatedTransport if crew is None else ElasticTransport
        transport = kind(rank, size, local_size, scheduler, mail, collectives, times, own)
        transport.sit_on(scheduler.add(partial(live, transport)))
        if crew is not None and isinstance(transport, ElasticTransport):
            transport.join(crew)
        if own.dies_at_seconds is not None:
            scheduler.kill(scheduler.tasks[rank], own.dies_at_seconds)
    if crew is not None:
        crew.begin()
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
            f"a worker takes the transport or nothing, but this one needs {names}: bind the others (functools.partial)"
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
    for what, rank in named:
        if not 0 <= rank < size:
            raise ConfigurationError(f"{what}: there is no rank {rank}, expected 0 to {size - 1}")
