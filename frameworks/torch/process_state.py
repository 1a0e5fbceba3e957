"""The state of torch that the simulator keeps apart for each of its ranks: the global random generator, and the modes.

Modes (``torch.no_grad()``, ``inference_mode()`` and ``autocast``) belong to a thread, which all simulated ranks share:
a rank that evaluates the average inside ``no_grad()`` must not turn off the gradients of the ranks that it waits for.

``lentando.comm.simulation`` imports this module when a simulation begins, if ``lentando.torch`` has been imported.
"""

from contextlib import ExitStack
from typing import NamedTuple

import torch

__all__ = ["restore", "save", "start"]

DEVICES = ("cpu", "cuda")
"""Types of devices that have an ``autocast`` of their own."""
AUTOCAST = tuple((False, torch.get_autocast_dtype(device)) for device in DEVICES)
"""The modes of ``autocast`` with which a rank begins."""

_inference = ExitStack()
"""The inference mode that ``restore`` has entered: it can only be set by entering it. Left at the next change."""


class _Modes(NamedTuple):
    """The modes of a rank: of gradients, inference, and ``autocast`` by type of device, with its nesting depth."""

    takes_gradients: bool
    is_inference: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    caches_casts: bool
    depth: int


def save() -> tuple[torch.Tensor, _Modes]:
    """Return the state of the generator, and the modes."""
    return torch.get_rng_state(), _modes()


def restore(state: tuple[torch.Tensor, _Modes]) -> None:
    """Set the generator and the modes to what ``save`` returned."""
    generator, modes = state
    torch.set_rng_state(generator)
    _set(modes)


def start(seed: int, rank: int) -> None:
    """Set the modes of a new process, and leave the generator as it is: programs seed it themselves."""
    _set(_Modes(True, False, AUTOCAST, True, 0))


def _depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _modes() -> _Modes:
    return _Modes(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple([(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES]),
        torch.is_autocast_cache_enabled(),
        _depth(),
    )


def _set(modes: _Modes) -> None:
    if modes == _modes():
        return
    _inference.close()
    if torch.is_inference_mode_enabled() != modes.is_inference:
        _inference.enter_context(torch.inference_mode(modes.is_inference))
    torch.set_grad_enabled(modes.takes_gradients)
    for device, (is_enabled, dtype) in zip(DEVICES, modes.autocast, strict=True):
        torch.set_autocast_enabled(device, is_enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(modes.caches_casts)
    for _ in range(modes.depth - _depth()):
        torch.autocast_increment_nesting()
    for _ in range(_depth() - modes.depth):
        torch.autocast_decrement_nesting()
