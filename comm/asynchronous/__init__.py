"""Asynchronous collectives: submitted by name in any order, negotiated between the ranks, executed by a thread.

``operations_of(transport)`` returns the asynchronous operations of a job, whose ``submit`` returns a ``Handle``.
"""

from lentando.comm.asynchronous.handle import Call, Handle, tensor_name
from lentando.comm.asynchronous.opening import close_operations, find_operations, open_operations, operations_of

__all__ = ["Call", "Handle", "close_operations", "find_operations", "open_operations", "operations_of", "tensor_name"]
