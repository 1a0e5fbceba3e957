"""Collectives are not differentiable: one refusal for all frameworks."""

from lentando.comm.errors import ConfigurationError

__all__ = ["not_differentiable"]


def not_differentiable(found: str, remedy: str) -> ConfigurationError:
    """Return the error for a collective whose result would silently have no gradient.

    Horovod's collectives are differentiable, so a program that was written for Horovod may rely on the gradient.

    Args:
        found: sentence without full stop that says where the gradient would be lost.
        remedy: how to call the collective without a gradient in this framework, in the imperative.
    """
    return ConfigurationError(
        f"{found}, but allreduce, allgather and broadcast are not differentiable here: the gradient would silently be "
        f"missing. {remedy} if no gradient is needed"
    )
