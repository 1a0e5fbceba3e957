"""``check_framework`` accepts the tests' NumPy adapter, and rejects wrong adapters with an error that says why."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy_model import NumpyModel
from reference import constant, slowmo

from lentando.comm.flat import Entry, FlatBuffer, FlatLayout, build_layouts
from lentando.comm.testing import run_ranks
from lentando.comm.transport import Array
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.testing import check_framework
from lentando.optimizers.weight_watch import SampledWeights

START = np.linspace(-1, 1, 11, dtype=np.float32)


class Subject:
    """The NumPy adapter, whose flat buffer is the model itself."""

    kind: type[NumpyModel] = NumpyModel

    def __init__(self) -> None:
        self.framework: Any = self.kind(START, (0.25, 0.125), momentum=0.5)

    @property
    def model(self) -> FlatBuffer:
        return self.framework.buffers[0]  # type: ignore[no-any-return]

    def read(self) -> Mapping[str, Array]:
        return {e.name: np.array(v) for e, v in zip(self.model.layout.entries, self.model.views, strict=True)}

    def assign(self, values: Mapping[str, Array]) -> None:
        for entry, view in zip(self.model.layout.entries, self.model.views, strict=True):
            if entry.name in values:
                view[...] = values[entry.name]

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        self.framework.rates = list(rates)

    def set_gradients(self, gradients: Mapping[str, Array]) -> None:
        self.framework.gradient[:] = np.concatenate([gradients[name] for name in ("part0", "part1")])

    def gather_gradients(self) -> None:
        """The gradient buffer is the gradient."""

    def scatter_gradients(self) -> None:
        """The gradient buffer is the gradient."""

    def step(self) -> None:
        self.framework.step()


class Copying(NumpyModel):
    """An adapter whose model has memory of its own, like that of a framework that shares none.

    In addition to the vector it has a statistic, an integer counter and an optimizer that counts its steps, whose
    first step is longer.
    """

    def __init__(self, start: Array, learning_rates: Sequence[float], momentum: float) -> None:
        super().__init__(start, learning_rates, momentum)
        parts = self.buffers[0].layout.entries
        (layout,) = build_layouts([*parts, Entry("mean", (2,), "float32", None)])
        self.x = np.concatenate([start, np.ones(2, np.float32)])
        self.gradient = np.zeros(start.size, np.float32)
        self.momentum_buffer = np.zeros(start.size, np.float32)
        self.buffers = [FlatBuffer(layout)]
        self.gradients = [FlatBuffer(FlatLayout(parts))]
        self.watch = SampledWeights([FlatBuffer(layout, self.x)])
        self.counter = np.array([7])
        self.steps = 0

    def load(self) -> None:
        self.buffers[0].array[:] = self.x

    def store(self) -> None:
        self.x[:] = self.buffers[0].array

    def not_averaged(self) -> Mapping[str, Array]:
        return {"counter": self.counter}

    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None:
        for array in tensors.values():
            self.counter[:] = array

    def optimizer_buffers(self) -> Mapping[str, Array]:
        half = START.size // 2
        return {"part0.m": self.momentum_buffer[:half], "part1.m": self.momentum_buffer[half:]}

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        self.momentum_buffer[:] = np.concatenate([averaged["part0.m"], averaged["part1.m"]])

    def reset_optimizer(self) -> None:
        super().reset_optimizer()
        self.steps = 0

    def step(self) -> None:
        self.momentum_buffer[:] = self.momentum * self.momentum_buffer + self.gradient * (1 if self.steps else 2)
        self.steps += 1
        half = START.size // 2
        self.x[:half] -= self.rates[0] * self.momentum_buffer[:half]
        self.x[half : START.size] -= self.rates[1] * self.momentum_buffer[half:]


class CopyingSubject(Subject):
    """The same, with the model in memory of its own."""

    kind: type[NumpyModel] = Copying

    @property
    def model(self) -> FlatBuffer:
        return FlatBuffer(self.framework.buffers[0].layout, self.framework.x)

    def gather_gradients(self) -> None:
        self.framework.gradients[0].array[:] = self.framework.gradient

    def scatter_gradients(self) -> None:
        self.framework.gradient[:] = self.framework.gradients[0].array


def subject_of(adapter: type[NumpyModel]) -> Callable[[], Any]:
    return type("Wrong", (CopyingSubject,), {"kind": adapter})


@pytest.mark.parametrize("make", [Subject, CopyingSubject])
def test_adapters_that_keep_the_promises_are_accepted(make: Callable[[], Any]) -> None:
    check_framework(make)


class LoadsNothing(Copying):
    def load(self) -> None: ...


class StoresNothing(Copying):
    def store(self) -> None: ...


class StoresThroughHalf(Copying):
    def store(self) -> None:
        with np.errstate(over="ignore"):
            self.x[:] = self.buffers[0].array.astype(np.float16)


class LoadsInAnotherOrder(Copying):
    def load(self) -> None:
        self.buffers[0].array[:] = self.x[::-1]


class ChangesBuffersAsItStores(Copying):
    def store(self) -> None:
        super().store()
        self.buffers[0].array[:] = 0


class MovesItsBuffers(Copying):
    def load(self) -> None:
        self.buffers = [FlatBuffer(self.buffers[0].layout, self.x.copy())]


class HasStatisticsFirst(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        layout = self.buffers[0].layout
        self.buffers = [FlatBuffer(FlatLayout([layout.entries[-1], *layout.entries[:-1]]))]


class HasOtherGroups(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        first, second, mean = self.buffers[0].layout.entries
        entries = [Entry(first.name, first.shape, first.dtype, 1), Entry(second.name, second.shape, second.dtype, 0)]
        self.buffers = [FlatBuffer(FlatLayout([*entries, mean]))]


class HasOneGroup(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        entries = [
            Entry(e.name, e.shape, e.dtype, None if e.group is None else 0) for e in self.buffers[0].layout.entries
        ]
        self.buffers = [FlatBuffer(FlatLayout(entries))]


class NamesByNumber(Copying):
    count = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        NamesByNumber.count += 1
        entries = [Entry(e.name, e.shape, e.dtype, e.group) for e in self.buffers[0].layout.entries]
        entries[-1] = Entry(f"mean{NamesByNumber.count}", (2,), "float32", None)
        self.buffers = [FlatBuffer(FlatLayout(entries))]


class SharesMemoryWithOthers(Copying):
    memory = np.zeros(START.size + 2, np.float32)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.buffers = [FlatBuffer(self.buffers[0].layout, self.memory)]


class RemembersRates(Copying):
    def learning_rates(self) -> Sequence[float]:
        return (0.25, 0.125)


class AveragesACounter(Copying):
    def not_averaged(self) -> Mapping[str, Array]:
        return {"mean": self.x[-2:], "counter": self.counter}


class ForgetsTheRest(Copying):
    def store_not_averaged(self, tensors: Mapping[str, Array]) -> None: ...


class LeavesGradientsOut(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        first = self.buffers[0].layout.entries[0]
        self.gradients = [FlatBuffer(FlatLayout([Entry("another", (START.size - first.size,), "float32", 0)]))]


class HasGradientsInOneShape(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        entries = [Entry(e.name, (*e.shape, 1), e.dtype, e.group) for e in self.buffers[0].layout.entries[:-1]]
        self.gradients = [FlatBuffer(FlatLayout(entries))]


class IgnoresAveragedGradients(Copying):
    @property
    def gradients(self) -> Sequence[FlatBuffer]:  # type: ignore[override]
        return [FlatBuffer(FlatLayout(self.buffers[0].layout.entries[:-1]), self.gradient.copy())]

    @gradients.setter
    def gradients(self, buffers: Sequence[FlatBuffer]) -> None: ...


class HidesMomentum(Copying):
    def optimizer_buffers(self) -> Mapping[str, Array]:
        return {}

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None: ...


class StoresBuffersNowhere(Copying):
    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None: ...


class StoresBuffersInACopy(Copying):
    def optimizer_buffers(self) -> Mapping[str, Array]:
        return getattr(self, "copy", None) or super().optimizer_buffers()

    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        self.copy = {name: array.copy() for name, array in averaged.items()}


class StoresOneBufferInTheOther(Copying):
    def store_optimizer_buffers(self, averaged: Mapping[str, Array]) -> None:
        half = START.size // 2
        self.momentum_buffer[:half] = averaged["part1.m"][:half]
        self.momentum_buffer[half:] = averaged["part1.m"]


class ResetsMomentumAlone(Copying):
    def reset_optimizer(self) -> None:
        self.momentum_buffer[:] = 0


class ResetsRatesToo(Copying):
    def reset_optimizer(self) -> None:
        super().reset_optimizer()
        self.rates = [0.25, 0.125]


class NoticesNothing(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)

        class Watch:
            found = False

            def look(self) -> None: ...

            def mark(self) -> None: ...

            def forget(self) -> None: ...

            def reset(self, found: bool = False) -> None:
                self.found = found

        self.watch = Watch()


class NoticesSteps(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        model = self.x

        class Watch:
            found = False
            before = model.copy()

            def look(self) -> None:
                self.found = self.found or not np.array_equal(model, self.before)

            def mark(self) -> None: ...

            def forget(self) -> None: ...

            def reset(self, found: bool = False) -> None:
                self.found = found
                self.before = model.copy()

        self.watch = Watch()


class WatchesOneParameter(Copying):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        first = self.buffers[0].layout.entries[0]
        self.watch = SampledWeights([FlatBuffer(FlatLayout([first]), self.x[: first.size])])


class DescribesAddresses(Copying):
    def describe_optimizer(self) -> OptimizerDescription:
        return OptimizerDescription("numpy SGD", {"owner": str(id(self))}, {})


class LacksAMethod(Copying):
    reset_optimizer = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "reset_optimizer":
            raise AttributeError(name)
        return super().__getattribute__(name)


class ExchangesElements(Copying):
    """Exchanges elements in both directions, so that a round trip shows nothing."""

    def load(self) -> None:
        super().load()
        self.buffers[0].array[-2:] = self.x[-2:][::-1]

    def store(self) -> None:
        super().store()
        self.x[-2:] = self.buffers[0].array[-2:][::-1]


WRONG: dict[type[NumpyModel], str] = {
    LoadsNothing: r"the buffers after load\(\): expected 'part0' to be \[.*\], found \[0, 0, 0",
    StoresNothing: r"the model after store\(\): expected 'part0' to be \[",
    StoresThroughHalf: r"the model after store\(\): expected 'part0' to be \[",
    LoadsInAnotherOrder: r"the buffers after load\(\): expected 'part0' to be \[",
    ChangesBuffersAsItStores: r"the buffers after store\(\): expected 'part0' to be \[.*found \[0, 0",
    MovesItsBuffers: "flat buffers must keep their memory while it trains",
    HasStatisticsFirst: r"expected the parameters of a buffer before its statistics, found 'mean' \(statistic\)",
    HasOtherGroups: "learning rate 0 in group 0 alone has not moved 'part0', which the buffers assign to group 1",
    HasOneGroup: r"each with one learning rate: found groups \[0\] in its buffers and 2 learning rates",
    NamesByNumber: "two equal models must have equal layouts",
    SharesMemoryWithOthers: "two models must not share the memory of their flat buffers",
    RemembersRates: r"expected learning_rates\(\) to be \[0.125, 0.0625\], as they were set, found \[0.25, 0.125\]",
    AveragesACounter: r"\['mean'\] are in not_averaged\(\) and in the buffers",
    ForgetsTheRest: r"not_averaged\(\) after store_not_averaged\(\): expected 'counter' to be \[8\], found \[7\]",
    LeavesGradientsOut: r"an entry of shape \(5,\) and dtype float32 for 'part0' in its gradient buffers, found None",
    HasGradientsInOneShape: r"an entry of shape \(5,\) .* for 'part0' in its gradient buffers, found Entry.*\(5, 1\)",
    IgnoresAveragedGradients: r"the model after a step along halved gradient buffers: expected 'part0' to be \[",
    HidesMomentum: r"expected optimizer_buffers\(\) to hold momentum after steps, found none",
    StoresBuffersNowhere: r"optimizer_buffers\(\) after store_optimizer_buffers\(\): expected 'part0.m'",
    StoresBuffersInACopy: r"a step after store_optimizer_buffers\(\) must use the stored buffers, it did not",
    StoresOneBufferInTheOther: r"optimizer_buffers\(\) after store_optimizer_buffers\(\): expected 'part0.m'",
    ResetsMomentumAlone: r"the model 1 steps? after reset_optimizer\(\): expected 'part0'",
    ResetsRatesToo: r"reset_optimizer\(\) must keep the learning rates",
    NoticesNothing: "its watch must report that the program has set 'part0', it does not",
    NoticesSteps: "its watch must not report a step of the base optimizer as weights set by the program",
    WatchesOneParameter: "its watch must report that the program has set 'part1', it does not",
    DescribesAddresses: "new optimizers of the same settings must be described equally",
    LacksAMethod: r"it lacks \['reset_optimizer'\], which the protocol Framework requires",
    ExchangesElements: r"the buffers after load\(\): expected 'mean' to be",
}


@pytest.mark.parametrize("adapter", WRONG, ids=lambda adapter: adapter.__name__)
def test_wrong_adapters_are_rejected(adapter: type[NumpyModel]) -> None:
    with pytest.raises(AssertionError, match=rf"^numpy adapter: .*({WRONG[adapter]})"):
        check_framework(subject_of(adapter))


def test_training_gives_what_a_few_lines_of_numpy_give() -> None:
    """Integers and powers of two make all sums exact, so that the results are bit-identical."""
    start, workers, steps, period = np.zeros(8), 2, 6, 3
    gradient = constant(8)
    settings = Settings(base=LocalSGD(), outer=SlowMomentum(1.0, 0.5), period=period)

    def run(transport: Any) -> Array:
        model = NumpyModel(start, (0.25, 0.25))
        replica = Replica(transport, model, settings)
        for step in range(steps):
            model.gradient[:] = gradient(transport.rank, step, model.x)
            replica.before_step()
            model.step()
            replica.after_step()
        return model.x

    expected = slowmo(workers, steps, start, gradient, period, lambda _: 0.25, beta=0.5)
    for rank, x in enumerate(run_ranks(workers, run)):
        assert np.array_equal(x, expected.x[rank])
