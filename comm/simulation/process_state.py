"""State that separate processes would each have and simulated ranks share: global random generators.

A program that calls ``random.random()`` or ``numpy.random.rand()`` expects that no other rank draws in between. The
state that is registered here is exchanged whenever the simulator switches to another rank. A framework's package
(``lentando.torch``) provides its own in a module ``process_state`` with the functions of ``ProcessState``.
"""

import ctypes
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import numpy as np

__all__ = ["IsolatedRanks", "ProcessState", "register_process_state"]


@dataclass(frozen=True)
class ProcessState:
    """A state of which each process has one.

    Attributes:
        save: returns the current state.
        restore: sets the state to one that ``save`` returned.
        start: sets the state that a new process would have; called with the simulation's seed and the rank.
    """

    save: Callable[[], Any]
    restore: Callable[[Any], None]
    start: Callable[[int, int], None]


class _StateFunctions(Protocol):
    """A ``ProcessState``, or a module with the same three functions."""

    @property
    def save(self) -> Callable[[], Any]: ...

    @property
    def restore(self) -> Callable[[Any], None]: ...

    @property
    def start(self) -> Callable[[int, int], None]: ...


def _start_python(seed: int, rank: int) -> None:
    random.seed(f"{seed} {rank}")


_legacy: Any = np.random
"""The functions that share one state. NumPy's stubs lack those that exchange its bit generator."""
_MT19937_BYTES = 2500
"""624 words and a position: the memory that ``MT19937.ctypes.state_address`` points to."""


class _NumpyState:
    """The state behind ``numpy.random.rand`` and similar functions, exchanged without a copy if it has not changed.

    NumPy takes 40 us to return the state and as long to set it. The bit generator can be exchanged as a whole at no
    cost, but this drops a second Gaussian value that is kept for the next call. If the bits are still those with which
    the rank was resumed, and no such value was kept at that time, then none is kept now.
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
    """Exchange another state between simulated ranks, beginning with the next simulation.

    Args:
        name: name of the state, such as ``"jax"``; replaces an earlier state of this name.
        state: functions that save, restore and start it.
    """
    _registered[name] = state


def _framework_states() -> Iterator[_StateFunctions]:
    """The ``process_state`` modules of those packages of Lentando that the program has imported."""
    for package in sorted(sys.modules):
        if package.startswith("lentando.") and package.count(".") == 1 and hasattr(sys.modules[package], "__path__"):
            name = f"{package}.process_state"
            if find_spec(name) is not None:
                yield cast(_StateFunctions, import_module(name))


class IsolatedRanks:
    """The states of all ranks that are not running. Rank -1 is the program around the simulation.

    Args:
        seed: seed of the simulation.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: list[_StateFunctions] = [*_registered.values(), *_framework_states()]
        self._kept: dict[int, list[Any]] = {}
        self._running = -1

    def enter(self, rank: int) -> None:
        """Save the states of the rank that was running, and restore or start those of ``rank``."""
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
        """Restore the states of the program around the simulation."""
        self.enter(-1)
