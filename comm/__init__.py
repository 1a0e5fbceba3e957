"""Communication between ranks: transports, collectives, flat buffers, topologies. Depends on NumPy and no framework."""

if __name__ == "comm":
    raise ImportError("import lentando.comm, not comm: a second copy of this package would not share its state")

from typing import Any


def __getattr__(name: str) -> Any:
    """Load ``lentando.comm.simulate`` at its first use: only the simulator needs greenlet."""
    if name == "simulate":
        from lentando.comm.simulation import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
