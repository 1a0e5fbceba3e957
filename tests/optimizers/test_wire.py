"""Rounding of what travels: what is sent and what is kept make up what there was."""

from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import BLOCK, Entry, FlatBuffer, build_layouts
from lentando.comm.simulation import simulate
from lentando.comm.testing import run_ranks
from lentando.comm.topology import Complete, OnePeerExponential, Topology
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules import wire
from lentando.optimizers.rules.adasum import AdasumDeltas
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.rounding import rounded_into
from lentando.optimizers.rules.wire import WireDtype

UNIT_ROUNDOFF: dict[WireDtype, float] = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
NOISE: dict[WireDtype, float] = {**UNIT_ROUNDOFF, "int8": 2 / 254, "int4": 2 / 14}
"""Largest rounding error as a fraction of elements from 1 to 2: those of integers depend on the largest of a block."""
DTYPES: dict[WireDtype, Any] = {"bfloat16": bfloat16, "float16": np.float16}


@pytest.mark.parametrize("name", DTYPES)
@given(values=arrays.arrays(np.float32, 5, elements=st.floats(-60000, 60000, width=32)))
def test_rounding_is_to_the_nearest_and_reports_what_was_sent(name: WireDtype, values: Array) -> None:
    out = np.empty(5, DTYPES[name])
    sent = rounded_into(out, values)
    assert sent.dtype == np.float32
    assert_array_equal(sent, out.astype(np.float32))
    assert_array_equal(out, values.astype(DTYPES[name]))  # the casts of NumPy and ml_dtypes
    assert_allclose(sent, values, rtol=UNIT_ROUNDOFF[name], atol=2.0**-25)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float16_never_overflows(dtype: Any) -> None:
    out = np.empty(4, np.float16)
    values = np.array([70000.0, -65520.0, 65504.0, 1e38], dtype)
    assert_array_equal(rounded_into(out, values), [65504.0, -65504.0, 65504.0, 65504.0])
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", DTYPES)
def test_the_largest_numbers_do_not_become_infinite(name: WireDtype) -> None:
    for dtype in (np.float32, np.float64):
        values = np.array([np.finfo(dtype).max, np.finfo(dtype).min], dtype)
        assert np.isfinite(rounded_into(np.empty(2, DTYPES[name]), values)).all()


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_not_finite_is_not_made_finite(name: WireDtype) -> None:
    out = np.empty(4, DTYPES[name])
    assert_array_equal(np.isnan(rounded_into(out, np.array([np.inf, -np.inf, np.nan, 1.0], np.float32))), [1, 1, 1, 0])


@pytest.mark.parametrize("bad", ["float32", "int16", "", 16, np.float16])
@pytest.mark.parametrize("base", [SGP, OSGP, DPSGD])
def test_other_dtypes_are_refused_by_name(base: Any, bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="wire_dtype must be 'bfloat16', 'float16'.* or None"):
        base(wire_dtype=bad)


MEAN = 1 + np.arange(64) / 67


def mixing(transport: Transport, base: Any, scale: float, steps: int) -> tuple[Array, Array]:
    """Steps without gradients: how far z is from the mean of all at most, in the last half, and where it ends.

    The replicas begin some steps of rounding apart: if they were equal, what they send and receive would be, too.
    """
    worker = Worker(transport, lambda *_: np.zeros(64), np.zeros(64), lambda _: 0.1, base=base)
    running = worker.replica.base.steps
    assert isinstance(running, PushSum)
    worker.model.x[:] = scale * (MEAN + 0.05 * (transport.rank - (transport.size - 1) / 2))
    worker.replica.progress.has_started = True
    running.adopt_consensus()
    farthest = np.zeros(64)
    worker.run(steps // 2)
    for _ in range(steps // 2):
        np.maximum(farthest, np.abs(worker.run(1) / scale / MEAN - 1), out=farthest)
    worker.replica.setup.wait_in_flight()
    return farthest, worker.model.x / scale


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize(
    ("base", "topology", "kept"),
    [(SGP, OnePeerExponential(), 0.5), (DPSGD, Complete(), 0.25), (OSGP, OnePeerExponential(), 0.5)],
)
def test_noise_of_a_replica_is_that_of_the_dtype(name: WireDtype, base: Any, topology: Topology, kept: float) -> None:
    """Replicas that agree: a step adds what the module's text says, and mixing forgets what earlier ones added."""
    outcome = simulate(lambda transport: mixing(transport, base(topology, wire_dtype=name), 1.0, 40), 4)
    added = 2 * (1 - kept) * NOISE[name] / (kept if base is OSGP else 1.0)
    for farthest, _ in outcome:
        assert added / 10 < farthest.max() <= 2 * added


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("base", [SGP, DPSGD, OSGP])
def test_the_mean_is_that_of_full_precision(base: Any, name: WireDtype) -> None:
    outcome = simulate(lambda transport: mixing(transport, base(wire_dtype=name), 1.0, 12), 4)
    assert_allclose(np.mean([z for _, z in outcome], axis=0), MEAN, rtol=1e-12)


@pytest.mark.parametrize("base", [SGP, DPSGD, OSGP])
def test_parameters_that_float16_cannot_hold_are_kept_where_they_do_not_fit(base: Any) -> None:
    """Clipped, with what was clipped kept: no rank gets an infinity, and the mean stays what it was."""
    outcome = simulate(lambda transport: mixing(transport, base(wire_dtype="float16"), 1e6, 12), 4)
    everyone = np.array([z for _, z in outcome])
    assert np.isfinite(everyone).all()
    assert_allclose(everyone.mean(axis=0), MEAN, rtol=1e-12)


class EightBits:
    """A wire as one would add it to wire.py: int8, with a scale for each block that is a power of 2."""

    is_exact = False

    def size_bytes(self, x: Array) -> int:
        return 4 * self._scales(x) + (x.size + 3) // 4 * 4

    def alignment_bytes(self, x: Array) -> int:
        return 4

    def share_in(self, memory: Array, x: Array) -> "EightBitShare":
        scales = self._scales(x)
        return EightBitShare(memory[: 4 * scales].view(np.float32), memory[4 * scales :].view(np.int8)[: x.size], x)

    def _scales(self, x: Array) -> int:
        return -(-x.size // BLOCK)


class EightBitShare:
    def __init__(self, scales: Array, coded: Array, x: Array) -> None:
        self._scales, self._coded, self._dtype = scales, coded, x.dtype

    def write(self, elements: slice, x: Array, share: float) -> Array:
        largest = np.abs(x * share).max(initial=2.0**-100)
        scale = self._scales[elements.start // BLOCK] = 2.0 ** np.ceil(np.log2(largest / 127))
        np.rint(x * share / scale, out=self._coded[elements], casting="unsafe")
        return self.read(elements)

    def read(self, elements: slice) -> Array:
        scales = np.repeat(self._scales, BLOCK)[: self._coded.size]
        return (self._coded[elements] * scales[elements]).astype(self._dtype)

    def restore(self, values: Array) -> None:
        for start in range(0, self._coded.size, BLOCK):
            self.write(slice(start, start + BLOCK), values[start : start + BLOCK], 1.0)


@pytest.mark.parametrize("staleness", [0, 2])
def test_another_coding_needs_no_other_code(staleness: int) -> None:
    """The sums over ranks are those of full precision, and a message takes a byte for each element."""
    size = BLOCK + 5
    layouts = build_layouts([Entry("w", (size,), "float32", 0), Entry("v", (3,), "float64", 0)])

    def mixed(transport: Transport) -> tuple[list[Array], int]:
        buffers = [FlatBuffer(layout) for layout in layouts]
        for buffer in buffers:
            buffer.array[:] = np.random.default_rng([transport.rank, buffer.array.size]).normal(size=buffer.array.size)
        first = [buffer.array.astype(np.float64) for buffer in buffers]
        graphs = OnePeerExponential().for_size(transport.size)
        gossip = PushSum(transport, buffers, graphs, staleness, wire=EightBits())
        gossip.after_step()
        sent = transport.traffic.bytes_sent
        for _ in range(60):
            gossip.after_step()
        state = gossip.state_dict()
        for message in (message for expected in state["under_way"] for message in expected["messages"]):
            again = EightBits().share_in(np.zeros(EightBits().size_bytes(buffers[0].array), np.uint8), buffers[0].array)
            again.restore(message["shares"]["flat"][0])
            assert_array_equal(again.read(slice(None)), message["shares"]["flat"][0])
        gossip.prepare_average()
        return [*first, *(buffer.array.astype(np.float64) for buffer in buffers)], sent

    outcome = run_ranks(3, mixed)
    for number in (0, 1):
        before = np.mean([arrays[number] for arrays, _ in outcome], axis=0)
        after = np.array([arrays[number + 2] for arrays, _ in outcome])
        assert_allclose(after.mean(axis=0), before, rtol=0, atol=3e-5 if number == 0 else 1e-13)
        assert np.abs(after - before).max() < 0.1
    assert {sent for _, sent in outcome} == {16 + 2 * 4 + (size + 3) // 4 * 4 + 4 + 4}


def test_a_wire_that_is_added_here_is_one_of_gossip_and_of_averages_but_adasum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adasum combines steps in the dtype that is sent, so that they cannot have any coding."""
    monkeypatch.setattr(wire, "WireDtype", Literal[WireDtype, "int6"])
    monkeypatch.setitem(wire._WIRES, "int6", EightBits())
    bases: list[Any] = [SGP, OSGP, DPSGD]
    for base in bases:
        outcome = simulate(lambda transport, base=base: mixing(transport, base(wire_dtype="int6"), 1.0, 40), 4)
        assert_allclose(np.mean([z for _, z in outcome], axis=0), MEAN, rtol=1e-12)
    assert AllReduce(wire_dtype="int6").wire_dtype == "int6"  # type: ignore[arg-type]
    for name in ("int6", "int8"):
        with pytest.raises(ConfigurationError, match="wire_dtype must be 'bfloat16', 'float16' or None"):
            AdasumDeltas(wire_dtype=name)  # type: ignore[arg-type]


def test_every_name_has_a_wire() -> None:
    assert wire._WIRES.keys() == {None, *get_args(WireDtype)}
