"""What crosses the wire: transports, collectives, flat buffers. Knows NumPy arrays and ranks, never a framework."""

if __name__ == "comm":
    raise ImportError("import lentando.comm, not comm: a second copy of this package would not share its state")

from typing import Any


def __getattr__(name: str) -> Any:
    """``lentando.comm.simulate``, loaded when it is used: only the simulator needs greenlet."""
    if name == "simulate":
        from lentando.comm.simulation import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
