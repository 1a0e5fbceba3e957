"""Calls of collectives whose gradient would be lost or wrong: the refusals of all frameworks."""

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Average, Op, Sum

__all__ = ["check_has_gradient", "not_differentiable"]


def not_differentiable(found: str, remedy: str) -> ConfigurationError:
    """Return the error for a collective whose result would silently have no gradient.

    Args:
        found: sentence without full stop that says where the gradient would be lost.
        remedy: how to call the collective without a gradient in this framework, in the imperative.
    """
    return ConfigurationError(
        f"{found}, but this function is not differentiable: the gradient would silently be missing. {remedy} if no "
        "gradient is needed"
    )


def check_has_gradient(function: str, op: Op) -> None:
    """Check that an op has a gradient, which a call needs.

    Horovod reduces gradients with the op of the forward pass. For a minimum, a product or Adasum that is not the
    gradient.

    Args:
        function: name of the function, for the message.
        op: how it combines values.

    Raises:
        ConfigurationError: if the op has none.
    """
    if op not in (Average, Sum):
        raise ConfigurationError(
            f"{function} with op={op.name} has no gradient here, and was given a tensor that requires one: use "
            "op=Average or op=Sum, or call it without a gradient"
        )
