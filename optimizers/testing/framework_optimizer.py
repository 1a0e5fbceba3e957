"""The promises of ``Framework`` about the base optimizer: learning rates, gradients, buffers, reset."""

import numpy as np

from lentando.comm.dtypes import is_floating
from lentando.optimizers.framework import Framework
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.testing.subject import RATE, STEPS, MakeSubject, take_step, train
from lentando.optimizers.testing.values import (
    Values,
    copied_values,
    expect,
    expect_same,
    incremented,
    random_values,
    trained_entries,
)

__all__ = [
    "check_description",
    "check_gradients",
    "check_learning_rates",
    "check_optimizer_buffers",
    "check_reset_optimizer",
]


def check_description(make: MakeSubject) -> None:
    """The description of the base optimizer is the same each time."""
    framework = make().framework
    first, second = framework.describe_optimizer(), framework.describe_optimizer()
    expect(
        isinstance(first, OptimizerDescription),
        framework,
        f"expected describe_optimizer() to return an OptimizerDescription, found {type(first).__name__}",
    )
    expect(first == second, framework, f"describe_optimizer() must not vary, found {first}, then {second}")


def check_learning_rates(make: MakeSubject) -> None:
    """They are those of now, one per group, and a parameter moves by the rate of its group."""
    subject = make()
    framework = subject.framework
    count = len(framework.learning_rates())
    for factor in (1.0, 0.5):
        rates = [factor * RATE / (1 + group) for group in range(count)]
        subject.set_learning_rates(rates)
        found = list(framework.learning_rates())
        expect(
            len(found) == count and all(isinstance(rate, float) for rate in found) and np.allclose(found, rates, 1e-6),
            framework,
            f"expected learning_rates() to be {rates}, as they were set, found {found}",
        )
    for still in range(count):
        subject = make()  # without momentum that would move it
        subject.set_learning_rates([0.0 if group == still else RATE for group in range(count)])
        before = copied_values(subject.read())
        take_step(subject, still)
        after = subject.read()
        for entry in trained_entries(framework):
            has_moved = not np.array_equal(before[entry.name], after[entry.name])
            expect(
                has_moved == (entry.group != still),
                framework,
                f"a step with learning rate 0 in group {still} alone has {'' if has_moved else 'not '}moved "
                f"{entry.name!r}, which the buffers assign to group {entry.group}",
            )


def check_gradients(make: MakeSubject) -> None:
    """The gradient buffers hold the gradients of the parameters, and what is written there is what the step uses."""
    subject, direct = make(), make()
    framework = subject.framework
    entries = trained_entries(framework)
    described = {e.name: e for buffer in framework.gradients for e in buffer.layout.entries}
    for entry in entries:
        found = described.get(entry.name)
        expect(
            found is not None and (found.shape, found.dtype) == (entry.shape, entry.dtype),
            framework,
            f"expected an entry of shape {entry.shape} and dtype {entry.dtype} for {entry.name!r} in its gradient "
            f"buffers, found {found}",
        )
    for number in range(STEPS):
        gradients = random_values(entries, 6, number)
        subject.set_gradients(gradients)
        subject.gather_gradients()
        expect_same(
            framework,
            _gradient_values(framework),
            gradients,
            "the gradient buffers after the subject has gathered gradients",
        )
        halved = {name: (array * array.dtype.type(0.5)).astype(array.dtype) for name, array in gradients.items()}
        for buffer in framework.gradients:
            for entry, view in zip(buffer.layout.entries, buffer.views, strict=True):
                if entry.name in halved:
                    view[...] = halved[entry.name]
        subject.scatter_gradients()
        subject.step()
        direct.set_gradients(halved)
        direct.step()
        expect_same(framework, subject.read(), direct.read(), "the model after a step along halved gradient buffers")


def check_optimizer_buffers(make: MakeSubject) -> None:
    """They are live, of the shape of a parameter, and what is stored is what the next step uses."""
    subject, untouched = make(), make()
    framework = subject.framework
    train(subject, STEPS)
    train(untouched, STEPS)
    buffers = copied_values(framework.optimizer_buffers())
    expect(
        bool(buffers),
        framework,
        "expected optimizer_buffers() to hold momentum after steps, found none: make the model with a base optimizer "
        "that has momentum, and return its buffers",
    )
    shapes = (
        {entry.shape for entry in trained_entries(framework)}
        | {(entry.size,) for entry in trained_entries(framework)}
        | {buffer.array.shape for buffer in framework.buffers}
    )
    for name, array in buffers.items():
        expect(
            is_floating(array.dtype) and array.shape in shapes,
            framework,
            f"expected optimizer buffer {name!r} to be floating-point and of the shape of a parameter, found shape "
            f"{array.shape} and dtype {array.dtype}",
        )
    changed = incremented(buffers)
    framework.store_optimizer_buffers(changed)
    found = framework.optimizer_buffers()
    expect_same(framework, found, changed, "optimizer_buffers() after store_optimizer_buffers()")
    take_step(subject, 7)
    take_step(untouched, 7)
    moved = subject.read()
    is_equal = all(np.array_equal(array, moved[name]) for name, array in untouched.read().items())
    expect(not is_equal, framework, "a step after store_optimizer_buffers() must use the stored buffers, it did not")

    restored, reference = make(), make()
    train(restored, STEPS)
    train(reference, STEPS)
    saved = copied_values(restored.framework.optimizer_buffers())
    restored.framework.store_optimizer_buffers({name: np.zeros_like(array) for name, array in saved.items()})
    restored.framework.store_optimizer_buffers(saved)
    train(restored, STEPS)
    train(reference, STEPS)
    expect_same(framework, restored.read(), reference.read(), "the model after its optimizer buffers were put back")


def check_reset_optimizer(make: MakeSubject) -> None:
    """A base optimizer that was reset trains as a new one, at the learning rate that it had."""
    subject, new = make(), make()
    framework = subject.framework
    start = copied_values(new.read())
    train(subject, STEPS)
    rates = [0.5 * RATE for _ in framework.learning_rates()]
    for each in (subject, new):
        each.set_learning_rates(rates)
    subject.assign(start)
    framework.load()
    framework.reset_optimizer()
    expect_same(framework, subject.read(), start, "the model after reset_optimizer()")
    expect(
        np.allclose(framework.learning_rates(), rates, 1e-6),
        framework,
        f"reset_optimizer() must keep the learning rates {rates}, found {list(framework.learning_rates())}",
    )
    for number in range(STEPS):
        take_step(subject, number)
        take_step(new, number)
        expect_same(framework, subject.read(), new.read(), f"the model {number + 1} steps after reset_optimizer()")


def _gradient_values(framework: Framework) -> Values:
    """The gradients of all parameters, without entries of other kinds such as which gradients are present."""
    names = {entry.name for entry in trained_entries(framework)}
    return {
        entry.name: np.array(view)
        for buffer in framework.gradients
        for entry, view in zip(buffer.layout.entries, buffer.views, strict=True)
        if entry.name in names
    }
