"""Memory that other processes of the same node can read and write, so that an average within a node needs no message.

It consists of anonymous files of Linux (memfd), which have no name that could be left behind or guessed, and exist as
long as they are mapped. Another process opens one through ``/proc``, which the kernel permits only to the same user. On
a system without them, ordinary memory is used, which has no handle.

A forked child (a data loader's worker, an evaluation) gets private mappings of these files at the same addresses, which
costs one system call per file. Its writes are private, as in ordinary memory. Unlike ordinary memory, pages that it has
not written to show later writes of its parent: a snapshot would cost every child a copy of the model. Only children of
``os.fork`` and of code that uses it (multiprocessing, data loaders) are covered.
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
"""Handle of an array for other processes: process, file descriptor, device and inode of the file, offset in bytes."""


class _Segment(mmap.mmap):
    """A mapped file, with its descriptor and address."""

    descriptor: int
    address: int


MAP_FIXED = 0x10
"""Linux's flag for a mapping that replaces the one at an address, which the mmap module lacks."""

_segments: WeakValueDictionary[int, _Segment] = WeakValueDictionary()
"""Mapped files by address. An array starts at the address of its segment, or after it."""


def shared_zeros(size: int, dtype: np.dtype[Any]) -> Array:
    """A one-dimensional array of zeros in shared memory; in ordinary memory if this system has none."""
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
    """The handle by which another process of this node opens a contiguous array; None if its memory is not shared."""
    start = _address(array)
    for reference in _segments.valuerefs():  # a list, for another thread may add a segment meanwhile
        segment = reference()
        if segment is not None and segment.address <= start < segment.address + len(segment):
            file = os.fstat(segment.descriptor)
            return [os.getpid(), segment.descriptor, file.st_dev, file.st_ino, start - segment.address]
    return None


def import_handle(handle: MemoryHandle, size: int, dtype: np.dtype[Any]) -> Array | None:
    """The array that a handle of another process refers to; None if this process cannot access it."""
    pid, number, device, inode, start = handle
    try:
        descriptor = os.open(Path("/proc", str(pid), "fd", str(number)), os.O_RDWR)
    except OSError:
        return None
    try:
        file = os.fstat(descriptor)
        # In another container, the same process number may belong to another process.
        if (file.st_dev, file.st_ino) != (device, inode):
            return None
        segment = mmap.mmap(descriptor, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return np.frombuffer(segment, dtype, size, start)


@cache
def _protect_from_children() -> None:
    """Let every forked child map all segments privately. Called when the first segment is created."""
    map_memory = ctypes.CDLL(None, use_errno=True).mmap  # looked up in the parent: a child should load nothing
    map_memory.restype = ctypes.c_void_p
    size, number = ctypes.c_size_t, ctypes.c_int
    map_memory.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_ssize_t]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED

    def map_privately() -> None:
        for address, segment in list(_segments.items()):
            if map_memory(address, len(segment), protection, flags, segment.descriptor, 0) != address:
                error = ctypes.get_errno()
                raise OSError(error, f"process {os.getpid()} may write into its parent's memory: {os.strerror(error)}")
        # Children of this child get ordinary copies of its memory, including its writes. To the neighbours of its
        # parent, this memory is no longer of use.
        _segments.clear()

    os.register_at_fork(after_in_child=map_privately)


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
