"""The state of torch's global random generator, which the simulator keeps apart for each of its ranks.

``lentando.comm.simulation`` imports this module when a simulation begins, if ``lentando.torch`` has been imported.
"""

import torch

__all__ = ["restore", "save", "start"]


def save() -> torch.Tensor:
    """Return the state of the generator."""
    return torch.get_rng_state()


def restore(state: torch.Tensor) -> None:
    """Set the state of the generator to one that ``save`` returned."""
    torch.set_rng_state(state)


def start(seed: int, rank: int) -> None:
    """Leave the generator as it is when a rank begins: programs seed it themselves."""
