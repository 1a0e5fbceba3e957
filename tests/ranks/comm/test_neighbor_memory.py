"""Messages that stay in the memory of their sender, over a real MPI: the same results as messages that are sent."""

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from forking import succeeds_in_child
from numpy_model import Worker

from lentando.comm import neighbor_memory
from lentando.comm.errors import MismatchError, TransportError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.neighbor_memory import NeighborMemory, open_neighbor_memory
from lentando.comm.topology import Complete, FromMatrix, PPeerExponential, Ring
from lentando.comm.transport import Transport
from lentando.optimizers.rules import gossip_memory
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP

BASES = {
    "SGP": SGP(),
    "SGP, ring": SGP(Ring()),
    "SGP in bfloat16": SGP(wire_dtype="bfloat16"),
    "D-PSGD": DPSGD(Complete()),
    "OSGP": OSGP(deterministic=True),
    "OSGP, staleness 3": OSGP(PPeerExponential(2), staleness=3, deterministic=True),
}


def opened(several: Transport, slots: int, slot_bytes: int) -> NeighborMemory:
    memory = open_neighbor_memory(several, slots, slot_bytes)
    if memory is None:
        pytest.skip("ranks that cannot read each other's memory")
    return memory


@pytest.mark.parametrize("name", BASES)
def test_gossip_is_that_of_messages_bit_identically(
    several: Transport, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With ranks that come late by turns, parameters of two dtypes, and a state that is restored half-way."""
    entries = [Entry("a", (70_001,), "float32", 0), Entry("b", (1003,), "float16", 0), Entry("c", (5,), "float64", 0)]

    def trained() -> list[bytes]:
        buffers = [FlatBuffer(layout) for layout in build_layouts(entries)]
        gossip: Any = BASES[name].bind(several, buffers, [])
        generator = np.random.default_rng(several.rank)
        for step in range(9):
            for buffer in buffers:
                buffer.array += generator.standard_normal(buffer.array.size).astype(buffer.array.dtype)
            if (step + several.rank) % 4 == 0:
                time.sleep(0.005)
            gossip.after_step()
            if step == 4:
                saved = gossip.state_dict()
                copies = [array.copy() for array in saved["biased"]["flat"]]
                gossip.load_state_dict({**saved, "biased": {**saved["biased"], "flat": copies}})
        gossip.wait_in_flight()
        found = [buffer.array.tobytes() for buffer in buffers] + [x.tobytes() for x in gossip.biased]
        return [*found, np.float64(gossip.weight).tobytes()]

    before = several.traffic.copy()
    directly = trained()
    middle = several.traffic.copy()
    monkeypatch.setattr(gossip_memory, "open_neighbor_memory", lambda *_: None)
    assert directly == trained()
    assert middle.messages - before.messages == several.traffic.messages - middle.messages


def test_no_rank_reads_too_early_or_writes_too_soon(several: Transport) -> None:
    """Each rank writes its number and the step to all others, in two slots, and comes late now and then."""
    memory = opened(several, 2, 8 * 3000)
    rank, others = several.rank, sorted(memory.neighbors)
    generator = np.random.default_rng(rank)
    reading: dict[int, Any] = {}
    for step in range(60):
        slot, number = step % 2, step + 1
        if slot in reading:
            reading[slot].wait()
        memory.slot(rank, slot).view(np.int64)[:] = step * 100 + rank
        memory.publish(slot, number)
        reading[slot] = memory.released(others, slot, number)
        if generator.random() < 0.2:
            time.sleep(0.002)
        memory.published(others, slot, number).wait()
        for other in others:
            assert (memory.slot(other, slot).view(np.int64) == step * 100 + other).all()
            memory.release(other, slot, number)
    for request in reading.values():
        request.wait()


def test_nothing_is_shared_unless_all_ranks_can(several: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    if several.rank == 0:
        monkeypatch.setattr(neighbor_memory, "KEEPS_ORDER", ())
    assert open_neighbor_memory(several, 1, 8) is None


def test_a_rank_does_not_wait_for_a_process_that_has_ended(several: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = opened(several, 1, 8)
    other = min(memory.neighbors)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setitem(memory._processes, other, ended.pid)  # type: ignore[arg-type]
    with pytest.raises(TransportError, match=f"the process of rank {other} has ended"):
        memory.published([other], 0, 1).wait()
    several.barrier()


@pytest.mark.parametrize("base", [SGP, OSGP])
def test_a_rank_that_waits_to_be_read_by_one_that_has_given_up_gets_an_error(
    several: Transport, request: pytest.FixtureRequest, base: Any
) -> None:
    """The last rank of a path takes fewer steps; the one before it waits for its message, and is waited for."""
    if several.size < 3 or several.name != "mpi":
        pytest.skip("a path of two ranks, or no transport that may be left in any state")
    transport = request.getfixturevalue("own_transport")
    neighbors = np.eye(several.size) + np.eye(several.size, k=1) + np.eye(several.size, k=-1)
    path = base(FromMatrix(neighbors / neighbors.sum(axis=0)))
    worker = Worker(transport, lambda _, step, x: x + step, np.ones(5), lambda _: 0.1, base=path)

    def trained() -> None:
        worker.run(3 if several.rank == several.size - 1 else 6)
        with worker.replica.averaged():
            pass

    with pytest.raises(MismatchError, match="the ranks are not about to do the same thing"):
        trained()


def test_saved_messages_are_read_before_neighbors_may_write_to_them(
    several: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank writes to its memory at once when it may."""
    buffers = [FlatBuffer(layout) for layout in build_layouts([Entry("a", (1000,), "float32", 0)])]
    buffers[0].array[:] = several.rank + 1
    gossip: Any = OSGP(Ring(), deterministic=True).bind(several, buffers, [])
    gossip.after_step()

    def release_and_lose(memory: NeighborMemory, rank: int, slot: int, number: int) -> None:
        several.barrier()  # all ranks have as many neighbours
        memory.slot(several.rank, slot)[:] = 255

    saved = gossip.state_dict()
    sent = [share.copy() for message in saved["under_way"][0]["messages"] for share in message["shares"]["flat"]]
    monkeypatch.setattr(NeighborMemory, "release", release_and_lose)
    gossip.load_state_dict(saved)
    loaded = [share for message in gossip.exchanges.in_flight[0].received for share in message.whole_shares()]
    assert [share.tobytes() for share in loaded] == [share.tobytes() for share in sent]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_does_not_gossip(several: Transport) -> None:
    buffers = [FlatBuffer(layout) for layout in build_layouts([Entry("a", (1000,), "float32", 0)])]
    gossip: Any = SGP(Ring()).bind(several, buffers, [])
    gossip.after_step()

    def refused() -> None:
        with pytest.raises(TransportError, match="made by fork"):
            gossip.after_step()

    assert succeeds_in_child(refused)
    gossip.after_step()
