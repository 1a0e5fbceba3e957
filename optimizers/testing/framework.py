"""What every framework adapter must pass before a replica can rely on it: the promises of ``Framework``."""

from collections.abc import Sequence

from lentando.optimizers.testing.framework_changes import check_optional_protocols, check_weight_watch
from lentando.optimizers.testing.framework_memory import (
    check_equal_models,
    check_layouts,
    check_load,
    check_members,
    check_not_averaged,
    check_store,
)
from lentando.optimizers.testing.framework_optimizer import (
    check_description,
    check_gradients,
    check_learning_rates,
    check_optimizer_buffers,
    check_reset_optimizer,
)
from lentando.optimizers.testing.subject import MakeSubject
from lentando.optimizers.testing.training_on_ranks import check_training_on_ranks

__all__ = ["check_framework"]


def check_framework(make: MakeSubject, sizes: Sequence[int] = (2, 3)) -> None:
    """Check that a framework adapter keeps every promise of ``lentando.optimizers.framework``.

    The adapter is driven alone first, and then by ``Replica`` on ranks that are threads of this process. It takes a
    few seconds with a small model. The flat buffers must be in host memory.

    Args:
        make: a function without arguments that makes an adapter over a new model and returns it with the means to act
            on the model, as a ``FrameworkSubject``. All models that it makes are equal, with new optimizers of the same
            settings, and have no memory in common.
        sizes: world sizes to train with.

    Raises:
        AssertionError: with the name of the adapter, the broken promise, what was expected and what was found.
    """
    for check in (
        check_members,
        check_layouts,
        check_equal_models,
        check_load,
        check_store,
        check_not_averaged,
        check_description,
        check_learning_rates,
        check_gradients,
        check_optimizer_buffers,
        check_reset_optimizer,
        check_weight_watch,
        check_optional_protocols,
    ):
        check(make)
    check_training_on_ranks(make, sizes)
