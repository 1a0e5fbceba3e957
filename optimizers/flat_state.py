"""Arrays in a state dict that lie like the flat buffers.

They are marked, so that a checkpoint can store them by parameter name, and another framework, which lays its buffers
out in another order, can find in them what belongs to each of its parameters.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

from lentando.comm.array_module import to_host
from lentando.comm.transport import Array

__all__ = ["flat_state", "is_flat_state"]


def flat_state(arrays: Sequence[Array | None], starts: Sequence[int] | None = None) -> dict[str, Any]:
    """A part of a state dict: one array per flat buffer, which holds what the buffer's elements have.

    Args:
        arrays: one-dimensional; None where there is nothing to hold. Those of a device are copied into host memory.
        starts: for arrays that are this rank's shards: the buffers' elements at which they begin. None says that this
            rank has the whole buffer's, or all parameters', as its own.
    """
    on_host = [None if array is None else to_host(array) for array in arrays]
    return {"flat": on_host, "starts": None if starts is None else list(starts)}


def is_flat_state(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether ``flat_state`` has made this."""
    return isinstance(value, dict) and value.keys() == {"flat", "starts"}
