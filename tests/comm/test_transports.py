"""The transports without a wire keep every promise, and ``check_transport`` refuses one that breaks any."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from lentando.comm.errors import TransportError
from lentando.comm.testing import ThreadTransport, check_transport, run_ranks
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic
from lentando.comm.transports.single import SingleTransport


def test_single_transport_keeps_its_promises() -> None:
    check_transport(SingleTransport())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_thread_transport_keeps_its_promises(size: int) -> None:
    run_ranks(size, check_transport)


def refused(mutant: type[ThreadTransport], size: int = 3, *, timeout_seconds: float = 1.0) -> str:
    """Why ``check_transport`` refuses a transport."""

    def check(healthy: ThreadTransport) -> None:
        check_transport(mutant(healthy.rank, healthy._world), timeout_seconds=timeout_seconds)

    with pytest.raises(AssertionError) as refusal:
        run_ranks(size, check, timeout_seconds=1.5 * timeout_seconds)
    return str(refusal.value)


class Finished:
    """A request that claims to be whatever it is asked."""

    def __init__(self, request: Request, then: Callable[[], None] = lambda: None, *, done: bool = True) -> None:
        self.request, self.then, self.done = request, then, done

    def wait(self) -> None:
        self.request.wait()
        self.then()

    def test(self) -> bool:
        if self.done and self.request.test():
            self.then()
        return self.done and self.request.test()


class WithRankOutOfRange(ThreadTransport):
    def __init__(self, rank: int, world: Any) -> None:
        super().__init__(rank, world)
        self.rank = rank + 1


class Overtaking(ThreadTransport):
    """The last message comes first."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        return super().exchange(sends[::-1], receives, tag)


class WithoutTags(ThreadTransport):
    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        return super().exchange(sends, receives)


class NeverComplete(ThreadTransport):
    """wait() works, test() never says so."""

    def exchange(self, *arguments: Any, **settings: Any) -> Request:
        return Finished(super().exchange(*arguments, **settings), done=False)


class WithoutProgress(ThreadTransport):
    """Messages arrive only when a caller waits or tests, as with an MPI that has no thread of its own."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        aside = [np.empty_like(array) for _, array in receives]

        def deliver() -> None:
            for (_, array), arrived in zip(receives, aside, strict=True):
                array[...] = arrived

        to_aside = [(peer, array) for (peer, _), array in zip(receives, aside, strict=True)]
        return Finished(super().exchange(sends, to_aside, tag), deliver)


class WaitingForTheReceiver(ThreadTransport):
    """A send that returns when the receiver answers: two that send first wait for each other."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        request = super().exchange(sends, receives, tag)
        for peer, _ in sends:
            super().exchange([], [(peer, np.empty(1))], 99 + tag).wait()
        for peer, _ in receives:
            super().exchange([(peer, np.empty(1))], [], 99 + tag)
        return request


class DroppingEmptyMessages(ThreadTransport):
    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        return super().exchange([(peer, array) for peer, array in sends if array.size], receives, tag)


class WithoutBfloat16(ThreadTransport):
    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        if any(array.dtype == "bfloat16" for _, array in sends):
            raise TransportError("what is a bfloat16?")
        return super().exchange(sends, receives, tag)


class ThroughFloat32(ThreadTransport):
    """Rounds what float32 cannot hold."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        rounded = [(peer, array.astype(np.float32).astype(array.dtype)) for peer, array in sends]
        return super().exchange(rounded, receives, tag)


class BroadcastingFromRank0(ThreadTransport):
    def broadcast(self, array: Array, root: int = 0) -> None:
        super().broadcast(array, 0)


class GatheringInWrongOrder(ThreadTransport):
    def allgather(self, array: Array) -> Array:
        return super().allgather(array)[::-1].copy()


class AlwaysSumming(ThreadTransport):
    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        super().allreduce(array, "sum")


class Averaging(ThreadTransport):
    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        super().allreduce(array, op)
        if op == "sum":
            array //= self.size


class LosingNaN(ThreadTransport):
    """As Open MPI's maximum, which takes a number where it can."""

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        gathered = self.allgather(array)
        if op == "sum" or array.dtype.kind != "f":
            super().allreduce(array, op)
        else:
            (np.fmax if op == "max" else np.fmin).reduce(gathered, out=array)
            negative = np.signbit(np.where(gathered == 0, gathered, 0.0 if op == "min" else -0.0))
            is_negative = negative.any(axis=0) if op == "min" else negative.all(axis=0)
            array[...] = np.where(array == 0, np.where(is_negative, -0.0, 0.0), array)
        self.traffic.collectives -= 1
        self.traffic.bytes_sent -= array.nbytes * (self.size - 1)


class KeepingNaNWhereItIs(LosingNaN):
    """As MPICH's maximum, whose result depends on the order in which ranks meet."""

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        own = array.copy()
        super().allreduce(array, op)
        if array.dtype.kind == "f":
            array[np.isnan(own)] = np.nan


class Saturating(ThreadTransport):
    """As Open MPI's sums of short integers, which stop at the largest one where vectors are added."""

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        before = array.copy()
        super().allreduce(array, op)
        if op == "sum" and array.dtype == np.uint8:
            array[array < before] = 255


class WithNaNOfEachRank(ThreadTransport):
    """NaN everywhere, with other bits on each rank."""

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        super().allreduce(array, op)
        if op != "sum" and array.dtype == np.float32:
            array.view(np.int32)[np.isnan(array)] = 0x7FC00000 + self.rank


class WithoutSignsOfZero(ThreadTransport):
    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        super().allreduce(array, op)
        array += 0


class WithoutBarrier(ThreadTransport):
    def barrier(self) -> None:
        self.traffic.count_collective(0)


class WithClockRunningBackwards(ThreadTransport):
    def clock(self) -> float:
        return -super().clock()


class CountingTwice(ThreadTransport):
    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        self.traffic.bytes_sent += sum(array.nbytes for _, array in sends)
        return super().exchange(sends, receives, tag)


class WithoutCollectives(Traffic):
    def count_collective(self, bytes_sent: int) -> None:
        self.bytes_sent += bytes_sent


class ForgettingCollectives(ThreadTransport):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.traffic = WithoutCollectives()


class AcceptingAnyRank(ThreadTransport):
    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        there = [[(peer, array) for peer, array in messages if 0 <= peer < self.size] for messages in (sends, receives)]
        return super().exchange(*there, tag, overlap=overlap)


class LosingNotices(ThreadTransport):
    """Keeps only the last one."""

    def leave_notice(self, peer: int, number: int) -> None:
        self._world.notices[self.rank, peer].clear()
        super().leave_notice(peer, number)


class CountingNotices(ThreadTransport):
    def leave_notice(self, peer: int, number: int) -> None:
        self.traffic.messages += 1
        super().leave_notice(peer, number)


class InventingNotices(ThreadTransport):
    def read_notice(self, peer: int) -> int | None:
        return super().read_notice(peer) or 0


class WithoutSubsetsOfItsOwn(ThreadTransport):
    def for_ranks(self, ranks: Sequence[int]) -> ThreadTransport | None:
        return self if self.rank in ranks else None


class GivingSubsetsToAllRanks(ThreadTransport):
    def for_ranks(self, ranks: Sequence[int]) -> ThreadTransport:
        return super().for_ranks(ranks) or ThreadTransport(0, type(self._world)(1, 1.0))


class MixingSubsetsUp(ThreadTransport):
    """A subset of all ranks shares their messages."""

    def for_ranks(self, ranks: Sequence[int]) -> ThreadTransport | None:
        subset = super().for_ranks(ranks)
        return ThreadTransport(self.rank, self._world) if len(ranks) == self.size else subset


class CountingSubsets(ThreadTransport):
    def for_ranks(self, ranks: Sequence[int]) -> ThreadTransport | None:
        subset = super().for_ranks(ranks)
        if subset is not None:
            subset.traffic = self.traffic
        return subset


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "reason"),
    [
        (LosingNotices, "waited 1.5 s for a notice"),
        (CountingNotices, "notices were counted as traffic"),
        (InventingNotices, "a notice that rank"),
        (WithRankOutOfRange, "rank 3 of 3"),
        (Overtaking, "order between two ranks"),
        (WithoutTags, "a message received with tag 0"),
        (NeverComplete, "test() of an exchange was not complete after 1.0 s"),
        (WithoutProgress, "no progress while the caller computed for 1.0 s"),
        (WaitingForTheReceiver, "waited 1.5 s for a message"),
        (DroppingEmptyMessages, "exchange of nothing"),
        (WithoutBfloat16, "exchange of every dtype: what is a bfloat16?"),
        (ThroughFloat32, "an exchange of float64"),
        (BroadcastingFromRank0, "from rank 1"),
        (GatheringInWrongOrder, "an allgather of float32, shape (5,)"),
        (AlwaysSumming, "an allreduce (min)"),
        (Averaging, "an allreduce (sum)"),
        (LosingNaN, "with NaN on rank 0: expected NaN"),
        (KeepingNaNWhereItIs, "with NaN on rank 0: expected NaN"),
        (Saturating, "an allreduce (sum) of uint8 beyond its largest number"),
        (WithNaNOfEachRank, "the ranks ended with different bits"),
        (WithoutSignsOfZero, "a zero has the wrong sign"),
        (WithoutBarrier, "barrier returned before rank"),
        (WithClockRunningBackwards, "clock() ran backwards"),
        (CountingTwice, "an exchange of two messages was counted as"),
        (ForgettingCollectives, "an allreduce was counted as"),
        (WithoutSubsetsOfItsOwn, "]): rank and size are"),  # for_ranks([0, 2]) or for_ranks([1]), whichever is first
        (GivingSubsetsToAllRanks, "for_ranks([0, 2]) returned"),
        (MixingSubsetsUp, "a message over all ranks"),
        (CountingSubsets, "operations of a subset were counted as traffic"),
        (AcceptingAnyRank, "a send of rank 3 in a world of 3 raised no TransportError"),
    ],
)
def test_check_transport_refuses(mutant: type[ThreadTransport], reason: str) -> None:
    assert reason in refused(mutant)


class GatheringByReference(SingleTransport):
    def allgather(self, array: Array) -> Array:
        self.traffic.collectives += 1
        return array[np.newaxis]


class WithoutProtocol:
    name = "incomplete"
    rank = 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(GatheringByReference, "the array given to allgather"), (WithoutProtocol, "lacks a method or attribute")],
)
def test_check_transport_refuses_a_world_of_one_as_well(wrong: Callable[[], Any], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_transport(wrong())


def test_single_transport_refuses_to_wait_for_what_no_rank_has_sent() -> None:
    request = SingleTransport().exchange([], [(0, np.empty(1))])
    assert not request.test()
    with pytest.raises(TransportError, match=r"waiting for 1 message\(s\) .* would never return"):
        request.wait()


@pytest.mark.parametrize("transport", [SingleTransport(), *run_ranks(1, lambda rank: rank)])
def test_message_of_another_length_than_its_receive_is_refused(transport: SingleTransport | ThreadTransport) -> None:
    with pytest.raises(TransportError, match="a message of 8 bytes met a receive of 16"):
        transport.exchange([(0, np.zeros(1))], [(0, np.zeros(2))])


def test_single_transport_aborts_with_the_status() -> None:
    with pytest.raises(SystemExit) as end:
        SingleTransport().abort(7)
    assert end.value.code == 7


def test_run_ranks_gives_the_results_by_rank() -> None:
    assert run_ranks(4, lambda transport: 10 * transport.rank) == [0, 10, 20, 30]


def test_run_ranks_raises_what_one_rank_raises_while_others_wait() -> None:
    def one_fails(transport: ThreadTransport) -> None:
        if transport.rank == 1:
            raise ValueError("boom")
        if transport.rank == 0:
            transport.exchange([], [(1, np.empty(1))]).wait()
        transport.barrier()

    with pytest.raises(ValueError, match="boom"):
        run_ranks(3, one_fails)


def test_run_ranks_ends_when_a_rank_aborts() -> None:
    with pytest.raises(TransportError, match="rank 2 ended the job with status 5"):
        run_ranks(3, lambda transport: transport.abort(5) if transport.rank == 2 else transport.barrier())


@pytest.mark.parametrize(
    "waiting", [ThreadTransport.barrier, lambda transport: transport.exchange([], [(0, np.empty(1))]).wait()]
)
def test_run_ranks_ends_when_a_rank_waits_in_vain(waiting: Callable[[ThreadTransport], None]) -> None:
    with pytest.raises(TransportError, match=r"waited 0\.1 s for a .*"):
        run_ranks(2, lambda transport: waiting(transport) if transport.rank == 1 else None, timeout_seconds=0.1)
