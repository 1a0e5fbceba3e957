"""The promises of ``Framework`` about layouts, buffers and the tensors that are not averaged."""

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.dtypes import is_floating, numpy_dtype
from lentando.comm.flat import FlatBuffer
from lentando.optimizers.framework import Framework
from lentando.optimizers.testing.subject import STEPS, MakeSubject, described, train
from lentando.optimizers.testing.values import (
    buffer_values,
    copied_values,
    entries_of,
    expect,
    expect_same,
    extreme_values,
    fill_buffers,
    incremented,
    random_values,
    trained_entries,
)

__all__ = ["check_equal_models", "check_layouts", "check_load", "check_members", "check_not_averaged", "check_store"]


def check_members(make: MakeSubject) -> None:
    """All that the protocols ``Framework`` and ``WeightWatch`` require is present."""
    framework = make().framework
    names = sorted(name for name in {*vars(Framework), *Framework.__annotations__} if not name.startswith("_"))
    missing = [name for name in names if not hasattr(framework, name)]
    expect(not missing, framework, f"it lacks {missing}, which the protocol Framework requires")
    expect(
        isinstance(framework.name, str) and bool(framework.name),
        framework,
        f"expected name to be a string such as 'torch', found {framework.name!r}",
    )
    watched = [name for name in ("found", "look", "mark", "forget", "reset") if not hasattr(framework.watch, name)]
    expect(not watched, framework, f"its watch lacks {watched}, which the protocol WeightWatch requires")


def check_layouts(make: MakeSubject) -> None:
    """One buffer per dtype, with parameters before statistics."""
    subject = make()
    framework = subject.framework
    buffers, entries = list(framework.buffers), entries_of(framework)
    expect(
        bool(buffers) and all(isinstance(buffer, FlatBuffer) for buffer in buffers),
        framework,
        f"expected buffers to be a sequence of FlatBuffer, found {[type(buffer).__name__ for buffer in buffers]}",
    )
    expect(
        all(is_on_host(buffer.array) for buffer in buffers), framework, "this suite needs flat buffers in host memory"
    )
    dtypes = [buffer.layout.dtype.name for buffer in buffers]
    expect(len(set(dtypes)) == len(dtypes), framework, f"expected one buffer per dtype, found buffers of {dtypes}")
    expect(
        all(is_floating(buffer.layout.dtype) for buffer in buffers),
        framework,
        f"expected buffers of floating-point dtypes, found {dtypes}: other tensors belong to not_averaged()",
    )
    names = [entry.name for entry in entries]
    expect(len(set(names)) == len(names), framework, f"expected unique names of entries, found {names}")
    for buffer in buffers:
        are_statistics = [entry.group is None for entry in buffer.layout.entries]
        expect(
            are_statistics == sorted(are_statistics),
            framework,
            f"expected the parameters of a buffer before its statistics, found {_described_groups(buffer)}",
        )
    expect(bool(trained_entries(framework)), framework, "expected parameters in its buffers, found only statistics")
    groups, rates = {entry.group for entry in trained_entries(framework)}, framework.learning_rates()
    expect(
        groups == set(range(len(rates))),
        framework,
        f"expected parameter groups numbered from 0, each with one learning rate: found groups "
        f"{sorted(groups, key=str)} in its buffers and {len(rates)} learning rates",
    )
    others = [entry.name for entry in entries if entry.order != "C"]
    expect(not others, framework, f"this suite needs a model with tensors in row-major order, {others} have another")
    for name, array in subject.read().items():
        entry = next((entry for entry in entries if entry.name == name), None)
        expect(
            entry is not None and array.shape == entry.shape and array.dtype == numpy_dtype(entry.dtype),
            framework,
            f"expected an entry with shape {array.shape} and dtype {array.dtype} for {name!r}, found {entry}",
        )
    unread = sorted(set(names) - subject.read().keys())
    expect(not unread, framework, f"its buffers hold {unread}, which the subject does not read from the model")


def check_equal_models(make: MakeSubject) -> None:
    """Equal models have equal layouts, values and descriptions, and no memory in common."""
    first, second = make(), make()
    framework = first.framework
    expect(
        described(framework) == described(second.framework),
        framework,
        f"two equal models must have equal layouts, found {described(framework)} and {described(second.framework)}",
    )
    expect_same(framework, second.read(), first.read(), "a second equal model")
    is_shared = any(
        np.shares_memory(mine.array, theirs.array)
        for mine, theirs in zip(framework.buffers, second.framework.buffers, strict=True)
    )
    expect(not is_shared, framework, "two models must not share the memory of their flat buffers")
    expect(
        framework.describe_optimizer() == second.framework.describe_optimizer(),
        framework,
        f"new optimizers of the same settings must be described equally, found {framework.describe_optimizer()} and "
        f"{second.framework.describe_optimizer()}",
    )


def check_load(make: MakeSubject) -> None:
    """After load(), the buffers hold the model, bit by bit."""
    subject = make()
    framework = subject.framework
    for values in (random_values(entries_of(framework), 1), extreme_values(entries_of(framework), 2)):
        subject.assign(values)
        framework.load()
        expect_same(framework, buffer_values(framework), values, "the buffers after load()")
        expect_same(framework, subject.read(), values, "the model after load()")


def check_store(make: MakeSubject) -> None:
    """After store(), the model holds the buffers, bit by bit, and load() gives the same back."""
    subject = make()
    framework = subject.framework
    before = described(framework), [buffer.array for buffer in framework.buffers]
    framework.load()
    for values in (random_values(entries_of(framework), 3), extreme_values(entries_of(framework), 4)):
        fill_buffers(framework, values)
        framework.store()
        expect_same(framework, subject.read(), values, "the model after store()")
        expect_same(framework, buffer_values(framework), values, "the buffers after store()")
        framework.load()
        expect_same(framework, buffer_values(framework), values, "the buffers after store() and load()")
    subject.assign(random_values(entries_of(framework), 5))
    train(subject, STEPS)
    framework.load()
    expect_same(framework, buffer_values(framework), subject.read(), "the buffers after steps and load()")
    after = described(framework), [buffer.array for buffer in framework.buffers]
    expect(
        before[0] == after[0], framework, f"its layouts must not change while it trains, {before[0]} became {after[0]}"
    )
    is_moved = any(not np.shares_memory(old, new) for old, new in zip(before[1], after[1], strict=True))
    expect(not is_moved, framework, "its flat buffers must keep their memory while it trains, they have moved")


def check_not_averaged(make: MakeSubject) -> None:
    """Tensors that are not averaged can be read and replaced, all or some of them, and touch nothing else."""
    subject = make()
    framework = subject.framework
    tensors = copied_values(framework.not_averaged())
    both = sorted(tensors.keys() & {entry.name for entry in entries_of(framework)})
    expect(not both, framework, f"{both} are in not_averaged() and in the buffers, expected each in one of them")
    changed = incremented(tensors)
    before = copied_values(subject.read())
    framework.store_not_averaged(changed)
    expect_same(framework, framework.not_averaged(), changed, "not_averaged() after store_not_averaged()")
    expect_same(framework, subject.read(), before, "the averaged tensors after store_not_averaged()")
    framework.store_not_averaged(dict(list(tensors.items())[:1]))
    expected = {**changed, **dict(list(tensors.items())[:1])}
    expect_same(framework, framework.not_averaged(), expected, "not_averaged() after one of its tensors was stored")


def _described_groups(buffer: FlatBuffer) -> str:
    entries = buffer.layout.entries
    return ", ".join(f"{e.name!r} ({'statistic' if e.group is None else f'group {e.group}'})" for e in entries)
