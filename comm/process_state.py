"""What separate processes would each have and simulated ranks share: the state of global random generators.

A program that calls ``random.random()`` or ``numpy.random.rand()`` expects that no other rank draws in between. State
that is registered here is exchanged when another rank goes on. Frameworks register theirs.
"""

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["IsolatedRanks", "ProcessState", "register_process_state"]


@dataclass(frozen=True)
class ProcessState:
    """A state that each process has once.

    Attributes:
        save: the state as it is now.
        restore: make it what ``save`` returned.
        start: make it what a new process would find; given the simulation's seed and the rank.
    """

    save: Callable[[], Any]
    restore: Callable[[Any], None]
    start: Callable[[int, int], None]


def _start_python(seed: int, rank: int) -> None:
    random.seed(f"{seed} {rank}")


_legacy: Any = np.random
"""The functions that share one state; NumPy's stubs do not know those that exchange its bit generator."""
_MT19937_BYTES = 2500
"""624 words and a position: what ``MT19937.ctypes.state_address`` points to."""


class _NumpyState:
    """The state behind ``numpy.random.rand`` and its like, exchanged without copying where nobody has drawn.

    NumPy takes 40 us to give the state out and as long to take it back. The bit generator can be exchanged as a whole
    at no cost, but a second Gaussian value that is kept for the next call is forgotten when that is done. As long as
    the bits are those with which a rank went on, and no such value was kept then, none is now.
    """

    def __init__(self) -> None:
        self._entered: tuple[Any, bytes, dict[str, Any] | None] | None = None

    def save(self) -> tuple[Any, bytes, dict[str, Any] | None]:
        generator = _legacy.get_bit_generator()
        bits = b""
        if type(generator) is np.random.MT19937:
            bits = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
            if self._entered is not None:
                entered, entered_bits, entered_gauss = self._entered
                if entered is generator and entered_bits == bits and entered_gauss is None:
                    return self._entered
        state = _legacy.get_state(legacy=False)
        return generator, bits, state if state.get("has_gauss") else None

    def restore(self, saved: tuple[Any, bytes, dict[str, Any] | None]) -> None:
        generator, _, with_gauss = saved
        _legacy.set_bit_generator(generator)
        if with_gauss is not None:
            _legacy.set_state(with_gauss)
        self._entered = saved

    def start(self, seed: int, rank: int) -> None:
        _legacy.set_bit_generator(np.random.MT19937([seed % 2**32, rank]))
        self._entered = None


_numpy = _NumpyState()
_registered: dict[str, ProcessState] = {
    "random": ProcessState(random.getstate, random.setstate, _start_python),
    "numpy.random": ProcessState(_numpy.save, _numpy.restore, _numpy.start),
}


def register_process_state(name: str, state: ProcessState) -> None:
    """Have this state exchanged between simulated ranks, from the next simulation on.

    Args:
        name: of the state, such as ``"torch"``; another state of this name is forgotten.
        state: how to save, restore and begin.
    """
    _registered[name] = state


class IsolatedRanks:
    """Keeps every rank's states while another rank runs. Rank -1 is the program around the simulation."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states = list(_registered.values())
        self._kept: dict[int, list[Any]] = {}
        self._running = -1

    def enter(self, rank: int) -> None:
        """Make the states those of ``rank``."""
        if rank == self._running:
            return
        self._kept[self._running] = [state.save() for state in self._states]
        self._running = rank
        kept = self._kept.get(rank)
        for number, state in enumerate(self._states):
            if kept is None:
                state.start(self._seed, rank)
            else:
                state.restore(kept[number])

    def leave(self) -> None:
        """Give the program around the simulation its states back."""
        self.enter(-1)
