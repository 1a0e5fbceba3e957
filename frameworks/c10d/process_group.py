"""The process group of backend ``lentando``: the methods that torch.distributed, DDP and FSDP call."""

from contextlib import ExitStack
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
from torch import distributed as dist
from torch._C._distributed_c10d import Store

from lentando.c10d.arguments import bounds, check_counts, check_dtypes, check_lengths, described
from lentando.c10d.arithmetic import name_of, reduce_parts
from lentando.c10d.calls import Calls
from lentando.c10d.exchanges import exchange_compared, gather_into, scatter_from
from lentando.c10d.members import Members
from lentando.c10d.memory import check_tensors, dtype_of, has_plain_memory, readable, writable
from lentando.c10d.messages import Messages, MessageWork, check_tag
from lentando.c10d.monitored import monitored_barrier
from lentando.c10d.named_group import NamedGroup
from lentando.c10d.process_end import end_with_process, keep
from lentando.c10d.reducing import Reducing
from lentando.c10d.sparse import submit_sparse_sum
from lentando.c10d.work import CollectiveWork

__all__ = ["LentandoProcessGroup"]


class LentandoProcessGroup(NamedGroup):
    """The ranks of a group.

    Methods have the names and arguments that torch.distributed calls; its functions, such as ``all_reduce``, document
    them. Each returns its work at once if ``opts.asyncOp`` is set, as it is by default.

    Args:
        members: what connects the ranks.
        timeout: default limit of the duration of an operation.
    """

    def __init__(self, members: Members, timeout: timedelta) -> None:
        self._transport = members.collectives
        super().__init__(self._transport.rank, self._transport.size)
        self._members = members
        self._calls = Calls(self._transport, members.endings.found, timeout, members.progress)
        self._messages = Messages(members.messages, members.endings.found, lambda: self._calls.timeout)
        self._reducing = Reducing(self._transport, self._calls.comparison, self._calls.send_next_ahead)
        end_with_process(self)

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
            return submit_sparse_sum(self._calls, self._transport, tensors, opts)
        ops = self._ops("allreduce", tensors, opts)

        def execute(stack: ExitStack) -> None:
            self._reducing.all_reduce([writable(tensor, stack) for tensor in tensors], ops)

        def send_ahead() -> None:
            self._reducing.send_ahead(readable(tensors[0]), ops[0])

        can_send_ahead = bool(tensors) and all(map(has_plain_memory, tensors))  # ``execute`` fills what is sent
        return self._calls.submit(
            "allreduce",
            [*ops, *described(tensors)],
            execute,
            tensors,
            opts,
            compares_late=True,
            send_ahead=send_ahead if can_send_ahead else None,
        )

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, opts: Any) -> CollectiveWork:
        """Combine each tensor over all ranks, at the root only."""
        ops = self._ops("reduce", tensors, opts)
        is_root = self.rank() == opts.rootRank

        def execute(stack: ExitStack) -> None:
            self._reducing.all_reduce([writable(t, stack) if is_root else readable(t).copy() for t in tensors], ops)

        arguments = [opts.rootRank, *ops, *described(tensors)]
        return self._calls.submit("reduce", arguments, execute, tensors, opts, compares_late=True)

    def broadcast(self, tensors: Any, opts: Any) -> CollectiveWork:
        """Fill each tensor with the root's."""
        check_tensors(tensors, "broadcast")

        def execute(stack: ExitStack) -> None:
            for tensor in tensors:
                self._transport.broadcast(writable(tensor, stack), opts.rootRank)

        return self._calls.submit("broadcast", [opts.rootRank, *described(tensors)], execute, tensors, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Fill the list of outputs that belongs to each input with the inputs of all ranks."""
        filled = [output for row in outputs for output in row]
        check_tensors([*inputs, *filled], "allgather")
        check_counts("allgather", len(inputs), outputs=len(outputs))
        for tensor, row in zip(inputs, outputs, strict=True):
            check_lengths("allgather", row, [tensor.numel()] * self.size())
            check_dtypes("allgather", [tensor], row)

        def execute(stack: ExitStack) -> None:
            for tensor, row in zip(inputs, outputs, strict=True):
                gathered = self._transport.allgather(readable(tensor))
                for output, values in zip(row, gathered, strict=True):
                    writable(output, stack)[...] = values

        return self._calls.submit("allgather", described(inputs), execute, filled, opts)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Fill the list of outputs of each rank with the inputs of that rank."""
        return self.allgather([list(row) for row in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Fill each output with the inputs of all ranks, one after the other."""
        check_tensors([*inputs, *outputs], "all_gather_single")
        check_lengths("all_gather_single", outputs, [self.size() * tensor.numel() for tensor in inputs])
        for tensor, output in zip(inputs, outputs, strict=True):
            check_dtypes("all_gather_single", [tensor], [output])

        def execute(stack: ExitStack) -> None:
            for tensor, output in zip(inputs, outputs, strict=True):
                writable(output, stack)[...] = self._transport.allgather(readable(tensor)).reshape(-1)

        return self._calls.submit("all_gather_single", described(inputs), execute, outputs, opts)

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
        check_counts("reduce_scatter", len(outputs), inputs=len(inputs))
        for output, row in zip(outputs, inputs, strict=True):
            check_lengths("reduce_scatter", row, [output.numel()] * self.size())
            check_dtypes("reduce_scatter", row, [output])

        def execute(stack: ExitStack) -> None:
            for output, row, op in zip(outputs, inputs, ops, strict=True):
                parts = [readable(tensor) for tensor in row]
                reduce_parts(self._transport, parts, writable(output, stack), op)

        return self._calls.submit("reduce_scatter", [*ops, *described(outputs)], execute, outputs, opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Combine each input over all ranks, and fill the output with this rank's part of it."""
        opts = dist.ReduceScatterOptions() if opts is None else opts
        ops = self._ops("reduce_scatter_single", outputs, opts)
        check_tensors(inputs, "reduce_scatter_single")
        check_lengths("reduce_scatter_single", inputs, [self.size() * output.numel() for output in outputs])
        for output, tensor in zip(outputs, inputs, strict=True):
            check_dtypes("reduce_scatter_single", [tensor], [output])

        def execute(stack: ExitStack) -> None:
            for output, tensor, op in zip(outputs, inputs, ops, strict=True):
                parts = np.split(readable(tensor), self.size())
                reduce_parts(self._transport, parts, writable(output, stack), op)

        return self._calls.submit("reduce_scatter_single", [*ops, *described(outputs)], execute, outputs, opts)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter_single(self, output: Any, tensor: Any, opts: Any = None) -> CollectiveWork:
        """Combine the input over all ranks, and fill the output with this rank's part of it."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    _reduce_scatter_base = reduce_scatter_single

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> CollectiveWork:
        """Collect the inputs of all ranks at the root, which alone has outputs."""
        filled = [output for row in outputs for output in row]
        check_tensors([*inputs, *filled], "gather")
        check_counts("gather", 1, inputs=len(inputs))
        if self.rank() == opts.rootRank:
            check_lengths("gather", filled, [inputs[0].numel()] * self.size())
            check_dtypes("gather", inputs, filled)

        def execute(stack: ExitStack) -> None:
            rows = [writable(output, stack) for output in filled] if self.rank() == opts.rootRank else None
            gather_into(self._transport, readable(inputs[0]), rows, opts.rootRank)

        return self._calls.submit("gather", [opts.rootRank, *described(inputs)], execute, filled, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> CollectiveWork:
        """Fill the output of each rank with the input of the root that is for it."""
        sent = [tensor for row in inputs for tensor in row]
        check_tensors([*outputs, *sent], "scatter")
        check_counts("scatter", 1, outputs=len(outputs))
        if self.rank() == opts.rootRank:
            check_lengths("scatter", sent, [outputs[0].numel()] * self.size())
            check_dtypes("scatter", sent, outputs)

        def execute(stack: ExitStack) -> None:
            rows = [readable(tensor) for tensor in sent] if self.rank() == opts.rootRank else None
            scatter_from(self._transport, rows, writable(outputs[0], stack), opts.rootRank)

        return self._calls.submit("scatter", [opts.rootRank, *described(outputs)], execute, outputs, opts)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> CollectiveWork:
        """Send one tensor to each rank, and receive one from each."""
        check_tensors([*inputs, *outputs], "alltoall")
        check_counts("alltoall", self.size(), inputs=len(inputs), outputs=len(outputs))
        check_dtypes("alltoall", inputs, outputs)

        def execute(stack: ExitStack) -> None:
            receives = [writable(output, stack) for output in outputs]
            exchange_compared(self._transport, [readable(tensor) for tensor in inputs], receives)

        return self._calls.submit("alltoall", [str(inputs[0].dtype)], execute, outputs, opts)

    def all_to_all_single(
        self, output: Any, tensor: Any, output_split_sizes: Any, input_split_sizes: Any, opts: Any = None
    ) -> CollectiveWork:
        """Send some rows of the input to each rank, and fill the output with what is received, by rank."""
        check_tensors([tensor, output], "all_to_all_single")
        check_dtypes("all_to_all_single", [tensor], [output])
        sent = bounds("input", tensor, input_split_sizes, self.size())
        received = bounds("output", output, output_split_sizes, self.size())

        def execute(stack: ExitStack) -> None:
            values, filled = readable(tensor), writable(output, stack)
            exchange_compared(
                self._transport,
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
        # MPI may still use the memory of an operation that has failed.
        keep(self) if self._calls.has_failed else self._members.close()

    def end(self, what: str) -> None:
        """Leave the group, and let the other members know what this rank has done, as the rest of a sentence."""
        if self._calls.close():
            self._messages.close()
            self._members.endings.note(what)

    def abort(self) -> None:
        """Let all operations that have not begun fail."""
        self._calls.fail("the group was aborted")

    def _ops(self, operation: str, tensors: Any, opts: Any) -> list[str]:
        check_tensors(tensors, operation)
        return [name_of(opts.reduceOp, dtype_of(tensor), operation) for tensor in tensors]
