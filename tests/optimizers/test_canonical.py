"""Ranks that hold the same model in different layouts, and average with each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from lentando.comm import simulate
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.transport import Array
from lentando.comm.world import init, rank, transport
from lentando.optimizers.canonical import canonical_tensors
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.weight_watch import NoWatch

COMMON = [
    Entry("conv.weight", (2, 3, 2, 1), "float64", 0),
    Entry("norm.weight", (2,), "float32", 0),
    Entry("out.weight", (5, 12), "float64", 0),
    Entry("norm.mean", (2,), "float64", None),
]
MAPPING = WeightMap(
    [
        WeightRule("conv.weight", "conv/kernel", (2, 3, 1, 0)),
        WeightRule("norm.weight", "norm/gamma"),
        WeightRule("norm.mean", "norm/moving_mean"),
        WeightRule("frozen.weight", "frozen/kernel", (1, 0)),
        WeightRule("out.weight", "out/kernel", (2, 3, 1, 0), ((5,), (2, 3, 2)), (3, 1)),
    ]
)


class Plain:
    """A framework whose tensors are views of the flat buffers."""

    name = "plain"

    def __init__(self) -> None:
        self.buffers: Sequence[FlatBuffer] = [FlatBuffer(layout) for layout in build_layouts(COMMON)]
        self.gradients: Sequence[FlatBuffer] = [FlatBuffer(buffer.layout) for buffer in self.buffers]
        self.watch = NoWatch()

    def load(self) -> None: ...

    def store(self) -> None: ...

    def step(self, step: int) -> None:
        """By gradients that are a function of the common parameters, rank and step."""
        for buffer, gradient in zip(self.buffers, self.gradients, strict=True):
            buffer.array[:] -= 0.1 * gradient.array

    def differentiate(self, step: int) -> None:
        for buffer, gradient in zip(self.buffers, self.gradients, strict=True):
            places = np.arange(buffer.array.size)
            gradient.array[:] = (1 + rank() + places % 3) * buffer.array - np.sin(places + step)

    def result(self) -> dict[str, Array]:
        return {e.name: view.copy() for b in self.buffers for e, view in zip(b.layout.entries, b.views, strict=True)}

    def learning_rates(self) -> Sequence[float]:
        return [0.1]

    def describe_optimizer(self) -> OptimizerDescription:
        return OptimizerDescription("plain SGD", {}, {})

    def optimizer_buffers(self) -> Mapping[str, Array]:
        return {}

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None: ...

    def reset_optimizer(self) -> None: ...

    def not_averaged(self) -> Mapping[str, Array]:
        return {}

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None: ...


class Permuted(Plain):
    """A framework whose tensors lie elsewhere, under other names, in another order and with permuted axes."""

    def __init__(self) -> None:
        own = [Entry(r.target, r.shape(e.shape), e.dtype, e.group) for r in MAPPING.rules.values() for e in COMMON
               if e.name == r.source]  # fmt: skip
        self.tensors = {entry.name: np.zeros(entry.shape, entry.dtype) for entry in reversed(own)}
        places = canonical_tensors(MAPPING, reversed(own))
        assert [place.entry for place in places] == COMMON
        by_name = {place.entry.name: place for place in places}
        super().__init__()
        self.views = []
        for buffer in self.buffers:
            for entry, view in zip(buffer.layout.entries, buffer.views, strict=True):
                common, own_view = by_name[entry.name].views(view, self.tensors[by_name[entry.name].own])
                assert np.shares_memory(common, buffer.array)
                assert np.shares_memory(own_view, self.tensors[by_name[entry.name].own])
                self.views.append((common, own_view))

    def load(self) -> None:
        for common, own in self.views:
            np.copyto(common, own)

    def store(self) -> None:
        for common, own in self.views:
            np.copyto(own, common)
        for buffer in self.buffers:
            buffer.array[:] = np.nan  # no rank may count on what lies there between load and store

    def differentiate(self, step: int) -> None:
        self.load()
        super().differentiate(step)

    def step(self, step: int) -> None:
        self.load()
        super().step(step)
        self.store()

    def result(self) -> dict[str, Array]:
        self.load()
        return super().result()


def train(kinds: Sequence[type[Plain]], **settings: Any) -> dict[str, Array]:
    init()
    model = kinds[rank() % len(kinds)]()
    model.load()
    for buffer in model.buffers:
        buffer.array[:] = np.linspace(-1, 1, buffer.array.size)
    model.store()
    replica = Replica(transport(), model, Settings(**settings))
    for step in range(11):
        model.differentiate(step)
        if replica.averages_gradients:
            replica.average_gradients()
        replica.before_step()
        model.step(step)
        replica.after_step()
    replica.setup.wait_in_flight()
    return model.result()


@pytest.mark.parametrize(
    "settings",
    [
        {"base": AllReduce("ring")},
        {"base": LocalSGD(), "outer": SlowMomentum(0.9, 0.6), "period": 4},
        {"base": SGP(), "outer": SlowMomentum(1.0, 0.5), "period": 5},
        {"base": OSGP(staleness=2, deterministic=True)},
    ],
)
def test_mixed_job_trains_what_a_plain_one_trains_bit_identically(settings: Any) -> None:
    plain = simulate(lambda: train([Plain], **settings), size=4)
    mixed = simulate(lambda: train([Plain, Permuted], **settings), size=4)
    other = simulate(lambda: train([Permuted], **settings), size=4)
    for one, two, three in zip(plain, mixed, other, strict=True):
        for name in one:
            assert np.isfinite(one[name]).all()
            assert_array_equal(one[name], two[name])
            assert_array_equal(one[name], three[name])


def test_mapping_that_leaves_out_a_tensor_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"leaves out tensors of this rank: \['other'\]"):
        canonical_tensors(MAPPING, [Entry("other", (2,), "float32", 0)])
