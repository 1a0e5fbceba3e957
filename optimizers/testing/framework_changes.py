"""The promises of ``Framework`` about weights that the program sets, and those of its optional extensions."""

from lentando.comm.flat import describe
from lentando.optimizers.framework import ChangingFramework, CoveringFramework, MeasuringFramework
from lentando.optimizers.testing.subject import RATE, STEPS, FrameworkSubject, MakeSubject, described, take_step, train
from lentando.optimizers.testing.values import (
    buffer_values,
    copied_values,
    entries_of,
    expect,
    expect_same,
    fill_buffers,
    random_values,
    trained_entries,
)
from lentando.optimizers.weight_watch import NoWatch

__all__ = ["check_optional_protocols", "check_weight_watch"]


def check_weight_watch(make: MakeSubject) -> None:
    """The watch notices weights that the program sets, and neither steps nor what a replica stores."""
    subject = make()
    framework, watch = subject.framework, subject.framework.watch
    if isinstance(watch, NoWatch):
        return
    subject.set_learning_rates([RATE for _ in framework.learning_rates()])
    framework.load()
    framework.store()
    watch.mark()
    watch.look()
    watch.reset()

    def step(number: int, description: str) -> None:
        take_step(subject, number)
        watch.mark()
        watch.look()
        expect(not watch.found, framework, f"its watch must not report {description} as weights set by the program")

    for number in range(STEPS):
        step(number, "a step of the base optimizer")
    framework.load()
    fill_buffers(framework, random_values(entries_of(framework), 8, scale=10.0))
    framework.store()
    watch.reset()
    watch.mark()
    watch.look()
    expect(not watch.found, framework, "its watch must not report values of store() as weights set by the program")
    step(STEPS, "a step after store()")
    subject.assign(copied_values(subject.read()))
    watch.look()
    expect(not watch.found, framework, "its watch must not report weights that the program sets to their own values")
    watch.mark()
    for each in trained_entries(framework):
        subject.assign({each.name: (subject.read()[each.name] + 100).astype(each.dtype)})
        watch.look()
        expect(watch.found, framework, f"its watch must report that the program has set {each.name!r}, it does not")
        take_step(subject, STEPS + 1)
        watch.mark()
        watch.look()
        expect(watch.found, framework, "its watch must keep its report until reset(), it was lost after a step")
        watch.reset()
        expect(not watch.found, framework, "its watch must forget its report at reset(), it does not")
        step(STEPS + 2, "a step after reset()")
    watch.reset(found=True)
    expect(watch.found, framework, "its watch must report weights set by the program after reset(found=True)")
    watch.forget()
    watch.reset()
    framework.load()
    fill_buffers(framework, random_values(entries_of(framework), 9, scale=10.0))
    framework.store()
    watch.mark()
    watch.look()
    expect(not watch.found, framework, "its watch must not compare with weights recorded before forget(), it does")


def check_optional_protocols(make: MakeSubject) -> None:
    """Names that the optional protocols return are of the right tensors, and an unchanged layout stays."""
    subject = make()
    framework = subject.framework
    names = {entry.name for entry in entries_of(framework)}
    if isinstance(framework, CoveringFramework):
        both = sorted(names & set(framework.left_out()))
        expect(not both, framework, f"left_out() names {both}, which its buffers hold")
    if isinstance(framework, MeasuringFramework):
        unknown = sorted({name for pair in framework.moments() for name in pair} - framework.not_averaged().keys())
        expect(not unknown, framework, f"moments() names {unknown}, expected names in not_averaged()")
    if isinstance(framework, ChangingFramework):
        _unchanged_layout(subject, framework, make())


def _unchanged_layout(subject: FrameworkSubject, framework: ChangingFramework, untouched: FrameworkSubject) -> None:
    """An adapter that follows changes reports none where there are none, and lays out the same again."""
    train(subject, STEPS)
    train(untouched, STEPS)
    missing = sorted(
        ({entry.name for entry in entries_of(framework)} | framework.not_averaged().keys()) - framework.known
    )
    expect(not missing, framework, f"expected known to contain all tensors, it lacks {missing}")
    expect(not framework.has_changed(), framework, "has_changed() must be False while the same parameters are trained")
    expect(
        not framework.replaced(), framework, f"expected replaced() to be empty, found {sorted(framework.replaced())}"
    )
    current, following = described(framework), describe(framework.next_layouts())
    expect(current == following, framework, f"expected next_layouts() to be {current}, found {following}")
    before = copied_values(subject.read())
    framework.change_layout()
    expect(described(framework) == current, framework, f"change_layout() made {described(framework)} of {current}")
    expect_same(framework, subject.read(), before, "the model after change_layout()")
    framework.load()
    expect_same(framework, buffer_values(framework), before, "the buffers after change_layout() and load()")
    train(subject, STEPS)
    train(untouched, STEPS)
    expect_same(framework, subject.read(), untouched.read(), "the model that has trained on after change_layout()")
