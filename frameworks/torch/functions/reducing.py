"""``allreduce``: combines the tensors of all ranks element by element."""

from typing import TypeVar

import torch

from lentando.comm import operations
from lentando.comm.operations import Op
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.optimizers.horovod_arguments import op_of
from lentando.torch.compression import Compression, Compressor
from lentando.torch.functions.calls import Handle, check_tensor
from lentando.torch.functions.reduction_calls import allreduce_of, allreduced
from lentando.torch.functions.refusals import refused_on_every_rank

__all__ = ["allreduce", "allreduce_", "allreduce_async", "allreduce_async_"]

T = TypeVar("T", torch.Tensor, float)


@refused_on_every_rank
def allreduce(
    tensor: T,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> T:
    """Combine the tensors of all ranks into a new tensor, which is bit-identical on every rank.

    The gradient of ``Average`` and ``Sum`` is the average or sum of the ranks' gradients, with the same factors.

    Args:
        tensor: dense tensor, of the same shape and dtype on all ranks. Or a Python float, int or bool, for which the
            result is a Python number, too (a float for ``Average``).
        average: older argument of Horovod in place of ``op``: True for ``Average``, False for ``Sum``.
        name: name of the call, which is compared between ranks and shown in messages.
        compression: how the tensor is compressed while it is sent: ``Compression.none``, ``fp16`` or ``bf16``.
        op: ``Average`` (the default), ``Sum``, ``Min``, ``Max``, ``Product`` or ``Adasum``. The average of integers is
            rounded towards zero.
        prescale_factor: factor by which the tensor is multiplied before it is combined. Products of integers are
            rounded towards zero.
        postscale_factor: factor by which the result is multiplied.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if another rank makes another call, or uses another name.
        ConfigurationError: if ``op`` is not defined for the dtype, for a tensor that requires a gradient with an ``op``
            that has none, and on a rank that is not in the process set.

    Example:
        >>> import lentando.torch as lt
        >>> lt.init()
        >>> lt.allreduce(torch.ones(2), op=lt.Sum, postscale_factor=3.0)
        tensor([3., 3.])
        >>> lt.shutdown()
    """
    if isinstance(tensor, bool | int | float):
        op = op_of(op, average)
        return operations.allreduce_number(
            tensor, op, name, process_set, prescale_factor=prescale_factor, postscale_factor=postscale_factor
        )
    check_tensor(tensor, "allreduce", has_gradient=True)
    (result,) = allreduced(
        "allreduce", [tensor], name, compression, op_of(op, average), prescale_factor, postscale_factor, process_set
    )
    return result


@refused_on_every_rank
def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Combine the tensors of all ranks as ``allreduce`` does, but in place, without a gradient; return the tensor."""
    check_tensor(tensor, "allreduce_", is_in_place=True)
    return allreduce_of(tensor, name, op_of(op, average), prescale_factor, postscale_factor, process_set).run()


@refused_on_every_rank
def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle[torch.Tensor]:
    """Start an ``allreduce`` in the background, without a gradient, and return its handle for ``synchronize``.

    Calls are matched by ``name``, in whatever order ranks make them; calls without a name by their order among those.
    """
    check_tensor(tensor, "allreduce_async")
    copied = tensor.detach().clone()
    return allreduce_of(copied, name, op_of(op, average), prescale_factor, postscale_factor, process_set).start()


@refused_on_every_rank
def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle[torch.Tensor]:
    """Start an ``allreduce_`` in the background. The tensor must not be used before ``synchronize`` has returned."""
    check_tensor(tensor, "allreduce_async_", is_in_place=True)
    return allreduce_of(tensor, name, op_of(op, average), prescale_factor, postscale_factor, process_set).start()
