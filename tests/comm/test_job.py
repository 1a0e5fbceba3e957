"""The state that modules keep for a job: one object of each class, for as long as the transport exists."""

import gc
import os
import threading
from weakref import ref

import pytest

from lentando.comm.job import drop_from_all_jobs, job_of
from lentando.comm.transports.single import SingleTransport
from lentando.comm.turns import Turns


class State:
    """State of some module."""

    def __init__(self, size: int = 1) -> None:
        self.size = size


def test_each_transport_has_a_job_of_its_own() -> None:
    first, second = SingleTransport(), SingleTransport()
    assert job_of(first) is job_of(first)
    assert job_of(first) is not job_of(second)
    assert job_of(first).get(State) is not job_of(second).get(State)


def test_a_job_creates_one_object_of_each_class() -> None:
    job = job_of(SingleTransport())
    assert job.find(State) is None
    state = job.get(State, lambda: State(3))
    assert (job.get(State), job.find(State), state.size) == (state, state, 3)
    other = State()
    job.put(other)
    assert job.get(State) is other
    assert job.drop(State) is other
    assert job.drop(State) is None


def test_threads_share_the_object_that_one_of_them_creates() -> None:
    transport = SingleTransport()
    start, found = threading.Barrier(8), []

    def look() -> None:
        start.wait()
        found.append(job_of(transport).get(State))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


@pytest.mark.slow
def test_the_state_of_a_job_is_gone_with_its_transport() -> None:
    transport = SingleTransport()
    state = ref(job_of(transport).get(State))
    assert state() is not None
    del transport
    gc.collect()
    assert state() is None


def test_a_class_is_dropped_from_all_jobs() -> None:
    transports = [SingleTransport(), SingleTransport()]
    for transport in transports:
        job_of(transport).get(State)
    drop_from_all_jobs(State)
    assert [job_of(transport).find(State) for transport in transports] == [None, None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_no_thread_that_has_its_turn() -> None:
    transport = SingleTransport()
    turns = job_of(transport).get(Turns)
    turns.enter("a call")
    child = os.fork()
    if child == 0:
        os._exit(0 if job_of(transport).find(Turns) is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert job_of(transport).find(Turns) is turns
