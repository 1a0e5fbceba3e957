"""A deterministic simulator: many virtual ranks in one process, on a modelled network, in virtual time.

``simulate`` runs a function on every rank. A rank runs until it waits or advances its clock; then the rank whose clock
is lowest is resumed. So the delays, stragglers and faults of the models occur identically in every run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lentando.comm.cluster import Compute, Link, Network, SharedLink
from lentando.comm.simulation.faults import Death, Delay, Drop, Duplicate, Fault, Pause, Slow
from lentando.comm.simulation.process_state import ProcessState, register_process_state

if TYPE_CHECKING:
    from lentando.comm.simulation.messages import Sent
    from lentando.comm.simulation.run import simulate
    from lentando.comm.simulation.transport import SimulatedTransport

__all__ = [
    "Compute",
    "Death",
    "Delay",
    "Drop",
    "Duplicate",
    "Fault",
    "Link",
    "Network",
    "Pause",
    "ProcessState",
    "Sent",
    "SharedLink",
    "SimulatedTransport",
    "Slow",
    "register_process_state",
    "simulate",
]

_NEED_GREENLET = {"Sent": "messages", "SimulatedTransport": "transport", "simulate": "run"}


def __getattr__(name: str) -> Any:
    """Load what needs greenlet when it is first used."""
    if name in _NEED_GREENLET:
        return getattr(import_module(f"lentando.comm.simulation.{_NEED_GREENLET[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
