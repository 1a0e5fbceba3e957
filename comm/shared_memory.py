"""Memory of one process that the others of its node can read and write: an average within a node needs no message.

Anonymous files of Linux's: they have no name that could be left behind or guessed, and live as long as something maps
them. Another process opens one through ``/proc``, which the kernel allows to the same user alone. Where a system has
none of this, memory is ordinary memory and nothing can be offered.

A forked child (a data loader's worker, an evaluation) gets private mappings of these files at the same addresses, which
costs one system call per file. What it writes stays its own, as in ordinary memory. Pages that it has not written to
follow what its parent writes later, unlike ordinary memory: a snapshot would cost every child a copy of the model. Only
children of ``os.fork`` and of what uses it (multiprocessing, data loaders) are covered.
"""

import ctypes
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np

from lentando.comm.transport import Array

__all__ = ["MemoryHandle", "export_handle", "import_handle", "shared_zeros"]

MemoryHandle = list[int]
"""Where another process finds an array: process, file descriptor, the file's device and number, first byte."""


class _Segment(mmap.mmap):
    """A mapped file, which knows its descriptor and where it lies."""

    descriptor: int
    address: int


MAP_FIXED = 0x10
"""Linux's flag for a mapping that replaces what is at an address, which the mmap module lacks."""

_segments: WeakValueDictionary[int, _Segment] = WeakValueDictionary()
"""By address: an array begins where its segment does, or somewhere behind."""


def shared_zeros(size: int, dtype: np.dtype[Any]) -> Array:
    """Zeroed memory for ``size`` elements that can be offered, if this system has such memory."""
    length = size * dtype.itemsize
    if length == 0 or not hasattr(os, "memfd_create"):
        return np.zeros(size, dtype)
    try:
        descriptor = os.memfd_create("lentando")
    except OSError:  # a sandbox that forbids it
        return np.zeros(size, dtype)
    try:
        os.ftruncate(descriptor, length)
        segment = _Segment(descriptor, length)
    except OSError:  # a limit on the size of files (ulimit -f), or on memory
        os.close(descriptor)
        return np.zeros(size, dtype)
    array: Array = np.frombuffer(segment, dtype)
    segment.descriptor, segment.address = descriptor, _address(array)
    _segments[segment.address] = segment
    _protect_from_children()
    finalize(segment, os.close, descriptor)
    return array


def export_handle(array: Array) -> MemoryHandle | None:
    """What another process of this node needs to open a contiguous array; None if its memory is not shared."""
    start = _address(array)
    for address, segment in _segments.items():
        if address <= start < address + len(segment):
            about = os.fstat(segment.descriptor)
            return [os.getpid(), segment.descriptor, about.st_dev, about.st_ino, start - address]
    return None


def import_handle(offered: MemoryHandle, size: int, dtype: np.dtype[Any]) -> Array | None:
    """The array of the process that offered it; None if it cannot be reached from here."""
    pid, number, device, inode, start = offered
    try:
        descriptor = os.open(Path("/proc", str(pid), "fd", str(number)), os.O_RDWR)
    except OSError:
        return None
    try:
        about = os.fstat(descriptor)
        # In another container the same numbers may be another process's.
        if (about.st_dev, about.st_ino) != (device, inode):
            return None
        segment = mmap.mmap(descriptor, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return np.frombuffer(segment, dtype, size, start)


@cache
def _protect_from_children() -> None:
    """Have every forked child map all segments privately. Called once there is a segment."""
    map_memory = ctypes.CDLL(None, use_errno=True).mmap  # looked up here: a child should load nothing
    map_memory.restype = ctypes.c_void_p
    size, number = ctypes.c_size_t, ctypes.c_int
    map_memory.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_ssize_t]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED

    def map_privately() -> None:
        for address, segment in list(_segments.items()):
            if map_memory(address, len(segment), protection, flags, segment.descriptor, 0) != address:
                error = ctypes.get_errno()
                raise OSError(error, f"process {os.getpid()} may write into its parent's memory: {os.strerror(error)}")
        # Children of this child get copies of its memory in the ordinary way, with what it has written. To the parent's
        # neighbours this memory is no longer of use.
        _segments.clear()

    os.register_at_fork(after_in_child=map_privately)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
