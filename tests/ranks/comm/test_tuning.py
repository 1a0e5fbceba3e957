"""What ranks of a real MPI measure before an all-reduce, and that it changes no bit."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import reference
from numpy.testing import assert_array_equal
from numpy_model import Worker
from ring_reference import along_the_ring, values_by_rank
from tuned_plans import tuned_plans

from lentando.comm.capabilities import Background, SharedNode
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.errors import ConfigurationError
from lentando.comm.objects import allgather_object
from lentando.comm.reductions import tuning
from lentando.comm.reductions.node import NodeReduction
from lentando.comm.reductions.plan import SHARED_FROM_BYTES_IF_SLOW, ReductionPlan, build
from lentando.comm.reductions.ring import Segments
from lentando.comm.reductions.tuning import SEGMENTS_VARIABLE
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Transport
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum

LARGE = SHARED_FROM_BYTES_IF_SLOW // 4
"""Elements of the smallest buffer of float32 that is measured in these tests."""
RINGS = [ReductionPlan("ring", segments) for segments in tuning.TRIED_SEGMENTS]


@pytest.fixture
def job(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transport]:
    """A new one of the same ranks, which has measured nothing."""
    if transport.size == 1:
        pytest.skip("one rank has nothing to choose")
    if transport.name != "mpi":
        pytest.skip(f"another job over {transport.name} cannot be opened here")
    monkeypatch.delenv(SEGMENTS_VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "MEASURED_FROM_BYTES", 4 * LARGE)
    new = another_job()
    yield new
    new.close()


def another_job() -> Transport:
    from lentando.comm.transports.mpi import MPITransport

    return MPITransport()


def test_all_ranks_choose_the_same_and_measure_once(job: Transport, caplog: pytest.LogCaptureFixture) -> None:
    """For the first buffer of a size. What later ones take, no rank needs to be asked. Rank 0 reports."""
    with caplog.at_level("INFO", "lentando"):
        plan_reduction(job, np.zeros(LARGE, np.float32), "ring")
    (found,) = tuned_plans(job)
    assert caplog.messages == ([f"all-reduce of {found}"] if job.rank == 0 else [])
    assert found.seconds.keys() == set(RINGS)
    assert len(set(allgather_object(job, repr(found)))) == 1
    before = job.traffic.copy()
    plan_reduction(job, np.zeros(LARGE - 1000, np.float32), "ring")
    plan_reduction(job, np.zeros(LARGE, np.float32), "ring", scatter_gather=True)
    assert job.traffic == before
    assert tuned_plans(job) == [found]


@pytest.mark.parametrize("scatter_gather", [False, True])
def test_shared_memory_of_one_node_is_taken_unmeasured_unless_that_is_asked_for(
    job: Transport, scatter_gather: bool
) -> None:
    if job.local_size < job.size:
        pytest.skip("on one node")
    array = shared_zeros(LARGE, np.dtype(np.float32))
    usual = plan_reduction(job, array, scatter_gather=scatter_gather)
    assert tuned_plans(job) == []
    measured = plan_reduction(job, array, "measured", scatter_gather=scatter_gather)
    (found,) = tuned_plans(job)
    assert found.seconds.keys() == {ReductionPlan("shared memory"), *RINGS, ReductionPlan("backend")}
    assert measured.shard == usual.shard


def test_a_thread_next_to_the_computation_measures_nothing_and_obeys_the_variable(
    job: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    for text in (f"{4 * LARGE}x1", "5000x2"):
        monkeypatch.setenv(SEGMENTS_VARIABLE, text)
        sent.append(messages_of_thread(job))
    chunk = -(-LARGE // job.size)
    hops = 2 * (job.size - 1)
    assert sent == [hops, hops * -(-chunk // 1250)]
    monkeypatch.delenv(SEGMENTS_VARIABLE)
    assert messages_of_thread(job) == hops  # in the usual segments


def messages_of_thread(job: Transport) -> int:
    """Of one all-reduce by a new thread, which had nothing to measure."""
    thread = job.for_thread() if isinstance(job, Background) else None
    if thread is None:
        pytest.skip("this MPI lets one thread in only")
    reduction = plan_reduction(thread, np.zeros(LARGE, np.float32), "ring")
    before = thread.traffic.messages
    reduction.all_reduce(mean=False)
    assert tuned_plans(thread) == []
    return thread.traffic.messages - before


def on_two_nodes(job: Transport) -> Transport:
    """Half of the ranks on each, by turns."""
    if job.size % 2:
        pytest.skip("two nodes with equally many ranks")
    assert isinstance(job, SharedNode)
    job.same_node = list(range(job.rank % 2, job.size, 2))
    job.local_rank, job.local_size = job.same_node.index(job.rank), len(job.same_node)
    return job


@pytest.mark.parametrize("given", [None, Segments(10_000, 3)])
def test_the_ring_between_nodes_is_measured_where_they_share_memory_within(
    job: Transport, monkeypatch: pytest.MonkeyPatch, given: Segments | None
) -> None:
    nodes = on_two_nodes(job)
    if nodes.local_size == 1:
        pytest.skip("a node of one rank has no rank to share with")
    if given is not None:
        monkeypatch.setenv(SEGMENTS_VARIABLE, f"{given.segment_bytes}x{given.in_flight}")
    by_rank = values_by_rank(job.size, LARGE, np.float32)
    array = shared_zeros(LARGE, np.dtype(np.float32))
    results = set()
    for once in (True, False):
        array[:] = by_rank[job.rank]
        job.barrier()
        reduction = (
            build(nodes, array, ReductionPlan("shared memory"))
            if once
            else plan_reduction(nodes, array, scatter_gather=True)
        )
        assert isinstance(reduction, NodeReduction)
        before = job.traffic.messages
        reduction.all_reduce(mean=True)
        results.add(array.tobytes())
        job.barrier()
    assert len(results) == 1
    if given is None:
        (found,) = tuned_plans(nodes)
        assert found.seconds.keys() == {ReductionPlan("shared memory", segments) for segments in tuning.TRIED_SEGMENTS}
    else:
        assert tuned_plans(nodes) == []
        own_bytes = array.nbytes // nodes.local_size // 2  # of this rank's part, what it sends in each half
        assert job.traffic.messages - before >= 2 * (own_bytes // given.segment_bytes)


@pytest.mark.parametrize("algorithm", ["ring", "measured"])
def test_measuring_touches_no_buffer_and_sums_are_right(job: Transport, algorithm: Algorithm) -> None:
    """Also in the way of the ring alone, whose bits are those along the ring whatever was chosen."""
    by_rank = values_by_rank(job.size, LARGE + 3, np.float32)
    array = by_rank[job.rank].copy()
    reduction = plan_reduction(job, array, algorithm)
    assert_array_equal(array, by_rank[job.rank])
    reduction.all_reduce(mean=True)
    expected = along_the_ring(by_rank, mean=True)
    if algorithm == "ring":
        assert array.tobytes() == expected.tobytes()
    np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-2)
    assert len({row.tobytes() for row in job.allgather(array)}) == 1


@pytest.mark.parametrize("text", ["4096", "0x4", "4096x0", "1MiBx4", "-1x4", ""])
def test_an_illegal_variable_is_an_error_on_every_rank(
    job: Transport, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(SEGMENTS_VARIABLE, text)
    with pytest.raises(ConfigurationError, match=f"{SEGMENTS_VARIABLE}='{text}': expected the bytes of a segment and"):
        plan_reduction(job, np.zeros(LARGE, np.float32), "ring")


def test_a_variable_that_reaches_some_ranks_only_is_an_error_on_every_rank(
    job: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    if job.rank == job.size - 1:
        monkeypatch.setenv(SEGMENTS_VARIABLE, "4096x4")
    with pytest.raises(ConfigurationError, match=rf"differs between ranks: .*not set; rank {job.size - 1}: 4096x4"):
        plan_reduction(job, np.zeros(LARGE, np.float32), "ring")


def test_a_job_resumes_bit_for_bit_whatever_was_chosen(job: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """O20, with other segments before the stop, after it, and in the run without one."""
    elements = LARGE // 2  # of float64
    start, gradient = np.linspace(-1, 1, elements), reference.quadratic(elements)

    def worker(segments: str | None) -> tuple[Worker, Transport]:
        if segments is None:
            monkeypatch.delenv(SEGMENTS_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(SEGMENTS_VARIABLE, segments)
        own = another_job()
        made = Worker(
            own,
            gradient,
            start,
            lambda step: 0.05 + 0.02 * (step % 7),
            base=LocalSGD(),
            outer=SlowMomentum(0.9, 0.6),
            period=2,
            algorithm="ring",
        )
        assert len(tuned_plans(own)) == (segments is None)
        return made, own

    straight, first = worker(None)
    straight.run(8)
    stopped, second = worker("5000x1")
    stopped.run(5)
    state, x = copy.deepcopy(stopped.replica.state_dict()), stopped.model.x.copy()
    resumed, third = worker("100000x7")
    resumed.model.x[:] = x
    resumed.replica.load_state_dict(state)
    resumed.run(3)
    assert_array_equal(resumed.model.x, straight.model.x)
    assert_array_equal(resumed.slow_buffer(), straight.slow_buffer())
    for each in (first, second, third):
        each.close()
