"""The process group of backend ``lentando``: the methods that torch.distributed, DDP and FSDP call."""

from contextlib import ExitStack
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import DistBackendError

from lentando.c10d.arithmetic import as_numbers, name_of, reduce_parts
from lentando.c10d.calls import Calls
from lentando.c10d.exchanges import exchange_parts, gather_into, scatter_from
from lentando.c10d.members import Members
from lentando.c10d.memory import check_tensors, dtype_of, readable, writable
from lentando.c10d.messages import Messages, MessageWork, check_tag
from lentando.c10d.monitored import monitored_barrier
from lentando.c10d.process_end import end_with_process
from lentando.c10d.reducing import Reducing
from lentando.c10d.sparse import all_reduce_sparse, check_sparse
from lentando.c10d.work import CollectiveWork
from lentando.comm.transport import Array

__all__ = ["LentandoProcessGroup"]

# Without types: the stubs of PyTorch's C++ classes declare overloads that it never calls, and differ between versions.
_ProcessGroup: Any = dist.ProcessGroup


class LentandoProcessGroup(_ProcessGroup):  # type: ignore[misc]
    """The ranks of a group.

    Methods have the names and arguments that torch.distributed calls; its functions, such as ``all_reduce``, document
    them. Each returns its work at once if ``opts.asyncOp`` is set, as it is by default.

    Args:
        members: what connects the ranks.
        timeout: default limit of the duration of an operation.
    """

    def __init__(self, members: Members, timeout: timedelta) -> None:
        self._transport = members.collectives
        super().__init__(self._transport.rank, self._transport.size)  # with a store, it refuses subclasses
        self._members = members
        self._name = self._description = ""
        self._calls = Calls(self._transport, members.endings.found, timeout)
        self._messages = Messages(members.messages, members.endings.found, lambda: self._calls.timeout)
        self._reducing = Reducing(self._transport)
        end_with_process(self)

    def getBackendName(self) -> str:  # noqa: N802 - PyTorch's name
        """The name under which the backend is registered."""
        return "lentando"

    @property
    def _device_types(self) -> list[torch.device]:
        """The devices whose tensors the group takes; saving checkpoints in the background asks for it."""
        return [torch.device("cpu")]

    def getGroupName(self) -> str:  # noqa: N802 - PyTorch's name
        """The name under which torch.distributed has registered the group."""
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802 - PyTorch's name
        """Keep the name: PyTorch's own class keeps it in backends of C++, of which this group has none."""
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802 - PyTorch's name
        """The description that was given to ``new_group``."""
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802 - PyTorch's name
        """Keep the description, for the same reason as the name."""
        self._description = description

    def get_group_store(self) -> Store:
        """The store that the members of the group share."""
        return self._members.store

    def set_timeout(self, timeout: timedelta) -> None:
        """Change the default limit of the duration of an operation."""
        self._calls.timeout = timeout

    def _set_sequence_number_for_group(self) -> None:
        """Nothing is to be done: operations are counted from 0 on every rank."""

    def _get_sequence_number_for_group(self) -> int:
        """The number of collective operations that were submitted."""
        return self._calls.count

    def allreduce(self, tensors: Any, opts: Any = None) -> CollectiveWork:
        """Combine each tensor over all ranks, in place."""
        opts = dist.AllreduceOptions() if opts is None else opts
        if any(tensor.is_sparse for tensor in tensors):
            return self._all_reduce_sparse(tensors, opts)
        ops = self._ops("allreduce", tensors, opts)

        def execute(stack: ExitStack) -> None:
            for tensor, op in zip(tensors, ops, strict=True):
                self._reducing.all_reduce(writable(tensor, stack), op)

        return self._calls.submit("allreduce", [*ops, *_described(tensors)], execute, tensors, opts)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, opts: Any) -> CollectiveWork:
        """Combine each tensor over all ranks, at the root only."""
        ops = self._ops("reduce", tensors, opts)
        is_root = self.rank() == opts.rootRank

        def execute(stack: ExitStack) -> None:
            for tensor, op in zip(tensors, ops, strict=True):
                self._reducing.all_reduce(writable(tensor, stack) if is_root else readable(tensor).copy(), op)

        return self._calls.submit("reduce", [opts.rootRank, *ops, *_described(tensors)], execute, tensors, opts)

    def broadcast(self, tensors: Any, opts: Any) -> CollectiveWork:
        """Fill each tensor with the root's."""
        check_tensors(tensors, "broadcast")

        def execute(stack: ExitStack) -> None:
            for tensor in tensors:
                self._transport.broadcast(writable(tensor, stack), opts.rootRank)

        return self._calls.submit("broadcast", [opts.rootRank, *_described(tensors)], execute, tensors, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Fill the list of outputs that belongs to each input with the inputs of all ranks."""
        filled = [output for row in outputs for output in row]
        check_tensors([*inputs, *filled], "allgather")
        for tensor, row in zip(inputs, outputs, strict=True):
            _check_lengths("allgather", row, [tensor.numel()] * self.size())

        def execute(stack: ExitStack) -> None:
            for tensor, row in zip(inputs, outputs, strict=True):
                gathered = self._transport.allgather(readable(tensor))
                for output, values in zip(row, gathered, strict=True):
                    writable(output, stack)[...] = values

        return self._calls.submit("allgather", _described(inputs), execute, filled, opts)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Fill the list of outputs of each rank with the inputs of that rank."""
        return self.allgather([list(row) for row in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Fill each output with the inputs of all ranks, one after the other."""
        check_tensors([*inputs, *outputs], "all_gather_single")
        _check_lengths("all_gather_single", outputs, [self.size() * tensor.numel() for tensor in inputs])

        def execute(stack: ExitStack) -> None:
            for tensor, output in zip(inputs, outputs, strict=True):
                writable(output, stack)[...] = self._transport.allgather(readable(tensor)).reshape(-1)

        return self._calls.submit("all_gather_single", _described(inputs), execute, outputs, opts)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def all_gather_single(self, output: Any, tensor: Any, opts: Any = None) -> CollectiveWork:
        """Fill the output with the inputs of all ranks, one after the other."""
        return self.all_gather_single_coalesced([output], [tensor], opts)

    _allgather_base = all_gather_single

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Combine the lists of inputs of all ranks, and fill each output with the element for this rank."""
        opts = dist.ReduceScatterOptions() if opts is None else opts
        ops = self._ops("reduce_scatter", outputs, opts)
        check_tensors([tensor for row in inputs for tensor in row], "reduce_scatter")
        for output, row in zip(outputs, inputs, strict=True):
            _check_lengths("reduce_scatter", row, [output.numel()] * self.size())

        def execute(stack: ExitStack) -> None:
            for output, row, op in zip(outputs, inputs, ops, strict=True):
                parts = [as_numbers(readable(tensor)) for tensor in row]
                reduce_parts(self._transport, parts, as_numbers(writable(output, stack)), op)

        return self._calls.submit("reduce_scatter", [*ops, *_described(outputs)], execute, outputs, opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Combine each input over all ranks, and fill the output with this rank's part of it."""
        opts = dist.ReduceScatterOptions() if opts is None else opts
        ops = self._ops("reduce_scatter_single", outputs, opts)
        check_tensors(inputs, "reduce_scatter_single")
        _check_lengths("reduce_scatter_single", inputs, [self.size() * output.numel() for output in outputs])

        def execute(stack: ExitStack) -> None:
            for output, tensor, op in zip(outputs, inputs, ops, strict=True):
                parts = np.split(as_numbers(readable(tensor)), self.size())
                reduce_parts(self._transport, parts, as_numbers(writable(output, stack)), op)

        return self._calls.submit("reduce_scatter_single", [*ops, *_described(outputs)], execute, outputs, opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter_single(self, output: Any, tensor: Any, opts: Any = None) -> CollectiveWork:
        """Combine the input over all ranks, and fill the output with this rank's part of it."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    _reduce_scatter_base = reduce_scatter_single

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> CollectiveWork:
        """Collect the inputs of all ranks at the root, which alone has outputs."""
        filled = [output for row in outputs for output in row]
        check_tensors([*inputs, *filled], "gather")
        if self.rank() == opts.rootRank:
            _check_lengths("gather", filled, [inputs[0].numel()] * self.size())

        def execute(stack: ExitStack) -> None:
            rows = [writable(output, stack) for output in filled] if self.rank() == opts.rootRank else None
            gather_into(self._transport, readable(inputs[0]), rows, opts.rootRank)

        return self._calls.submit("gather", [opts.rootRank, *_described(inputs)], execute, filled, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> CollectiveWork:
        """Fill the output of each rank with the input of the root that is for it."""
        sent = [tensor for row in inputs for tensor in row]
        check_tensors([*outputs, *sent], "scatter")
        if self.rank() == opts.rootRank:
            _check_lengths("scatter", sent, [outputs[0].numel()] * self.size())

        def execute(stack: ExitStack) -> None:
            rows = [readable(tensor) for tensor in sent] if self.rank() == opts.rootRank else None
            scatter_from(self._transport, rows, writable(outputs[0], stack), opts.rootRank)

        return self._calls.submit("scatter", [opts.rootRank, *_described(outputs)], execute, outputs, opts)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Send one tensor to each rank, and receive one from each."""
        check_tensors([*inputs, *outputs], "alltoall")

        def execute(stack: ExitStack) -> None:
            self._exchange([readable(each) for each in inputs], [writable(each, stack) for each in outputs])

        return self._calls.submit("alltoall", [str(inputs[0].dtype)], execute, outputs, opts)

    def all_to_all_single(
        self, output: Any, tensor: Any, output_split_sizes: Any, input_split_sizes: Any, opts: Any = None
    ) -> CollectiveWork:
        """Send some rows of the input to each rank, and fill the output with what is received, by rank."""
        check_tensors([tensor, output], "all_to_all_single")
        sent = _bounds("input", tensor, input_split_sizes, self.size())
        received = _bounds("output", output, output_split_sizes, self.size())

        def execute(stack: ExitStack) -> None:
            values, filled = readable(tensor), writable(output, stack)
            self._exchange(
                [values[start:end] for start, end in pairwise(sent)],
                [filled[start:end] for start, end in pairwise(received)],
            )

        return self._calls.submit("all_to_all_single", [str(tensor.dtype)], execute, [output], opts)

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> CollectiveWork:
        """Complete once all ranks have called this."""
        return self._calls.submit("barrier", [], lambda _: None, [], opts)  # the ranks compare the call: they all wait

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait for all ranks; rank 0 raises an error that says which are missing after the timeout."""
        limit = self._calls.timeout if timeout is None else timeout
        monitored_barrier(self._messages, self.rank(), self.size(), limit, wait_all_ranks)

    def send(self, tensors: Any, peer: int, tag: int) -> MessageWork:
        """Send a tensor to another rank."""
        check_tag(tag)
        return self._messages.send(tensors, peer, tag)

    def recv(self, tensors: Any, peer: int, tag: int) -> MessageWork:
        """Fill a tensor with the message of another rank."""
        check_tag(tag)
        return self._messages.receive(tensors, peer, tag)

    def recv_anysource(self, tensors: Any, tag: int) -> MessageWork:
        """Fill a tensor with the message of the rank that sends first."""
        check_tag(tag)
        return self._messages.receive(tensors, None, tag)

    def shutdown(self) -> None:
        """Leave the group, after the operations that were submitted."""
        self.end("has destroyed the group")
        if not self._calls.has_failed:  # MPI may still use the memory of an operation that has failed
            self._members.close()

    def end(self, what: str) -> None:
        """Leave the group, and let the other members know what this rank has done, as the rest of a sentence."""
        if self._calls.close():
            self._messages.close()
            self._members.endings.note(what)

    def abort(self) -> None:
        """Let all operations that have not begun fail."""
        self._calls.fail("the group was aborted")

    def _all_reduce_sparse(self, tensors: Any, opts: Any) -> CollectiveWork:
        for tensor in tensors:
            check_sparse(tensor, opts.reduceOp)

        def execute(_: ExitStack) -> None:
            for tensor in tensors:
                all_reduce_sparse(self._transport, tensor)

        described = [f"sparse {[*tensor.shape]} of {tensor.dtype}" for tensor in tensors]
        return self._calls.submit("allreduce", described, execute, tensors, opts)

    def _ops(self, operation: str, tensors: Any, opts: Any) -> list[str]:
        check_tensors(tensors, operation)
        return [name_of(opts.reduceOp, dtype_of(tensor), operation) for tensor in tensors]

    def _exchange(self, sends: list[Array], receives: list[Array]) -> None:
        """Compare what all ranks send to each other with what they receive, and exchange it."""
        lengths = [[array.size for array in arrays] for arrays in (sends, receives)]
        by_rank = self._transport.allgather(np.array(lengths, np.int64))
        differ = np.argwhere(by_rank[:, 0, :] != by_rank[:, 1, :].T)
        if differ.size:
            source, target = differ[0].tolist()
            raise DistBackendError(
                f"rank {source} sends {by_rank[source, 0, target]} elements to rank {target}, which expects "
                f"{by_rank[target, 1, source]}"
            )
        exchange_parts(self._transport, sends, receives)


def _described(tensors: list[torch.Tensor]) -> list[str]:
    return [f"{tensor.numel()} x {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors]


def _check_lengths(operation: str, tensors: list[torch.Tensor], lengths: list[int]) -> None:
    found = [tensor.numel() for tensor in tensors]
    if found != lengths:
        raise ValueError(f"{operation}: expected tensors of {lengths} elements, got {found}")


def _bounds(which: str, tensor: torch.Tensor, splits: list[int], size: int) -> list[int]:
    """Where the elements for each rank begin in a tensor, and where the last ones end."""
    rows = tensor.size(0) if tensor.dim() else 1
    if not splits:
        if rows % size:
            raise RuntimeError(
                f"all_to_all_single: the {rows} rows of the {which} cannot be divided among {size} ranks"
            )
        splits = [rows // size] * size
    if len(splits) != size or sum(splits) != rows:
        raise RuntimeError(
            f"all_to_all_single: expected {size} split sizes of the {which} whose sum is its {rows} rows, got {splits}"
        )
    elements = tensor.numel() // rows if rows else 0
    return [0, *accumulate(elements * split for split in splits)]
