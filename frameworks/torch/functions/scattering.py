"""``reducescatter``: combines the tensors of all ranks, and gives each rank a part of the result."""

from collections.abc import Iterable, Sequence

import torch

from lentando.comm import operations
from lentando.comm.operations import Average, Op, Sum
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.optimizers.no_gradient import check_has_gradient
from lentando.torch.compression import Compression, Compressor
from lentando.torch.convert import as_array, new_tensor
from lentando.torch.functions.calls import Handle, TensorCall, check_tensor, check_tensors, host_of
from lentando.torch.functions.gathering import grouped_allgather
from lentando.torch.functions.gradients import compressed_with_gradient, needs_gradient
from lentando.torch.functions.refusals import refused_on_every_rank

__all__ = ["grouped_reducescatter", "grouped_reducescatter_async", "reducescatter", "reducescatter_async"]


@refused_on_every_rank
def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Combine the tensors of all ranks as ``allreduce`` does, and return this rank's part along the first axis.

    Parts are of equal length; if that is not possible, the first ranks get one row more. The gradient is an
    ``allgather`` of the ranks' gradients, multiplied by the number of ranks for ``Sum``, and by the factors.

    Args:
        tensor: dense tensor with at least one axis, of the same shape and dtype on all ranks.
        name: name of the call, which is compared between ranks and shown in messages.
        compression: how the tensor is compressed while it is sent: ``Compression.none``, ``fp16`` or ``bf16``.
        op: ``Average`` or ``Sum``. The average of integers is rounded towards zero.
        process_set: the participating ranks.
        prescale_factor: factor by which the tensor is multiplied before it is combined.
        postscale_factor: factor by which the result is multiplied.

    Raises:
        MismatchError: on every rank, if another rank makes another call, or uses another name.
        ConfigurationError: on every rank, for a scalar, another ``op``, or one that is not defined for the dtype.

    Example:
        >>> import lentando.torch as lt
        >>> lt.init()
        >>> lt.reducescatter(torch.ones(2), op=lt.Sum)
        tensor([1., 1.])
        >>> lt.shutdown()
    """
    check_tensor(tensor, "reducescatter", has_gradient=True)
    return _scattered("reducescatter", [tensor], name, compression, op, process_set, prescale_factor, postscale_factor)[
        0
    ]


@refused_on_every_rank
def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle[torch.Tensor]:
    """Start a ``reducescatter`` in the background, without a gradient, and return its handle for ``synchronize``.

    The tensor must not be changed before ``synchronize`` has returned. Calls are matched by ``name``, in whatever order
    ranks make them; calls without a name by their order among those.
    """
    check_tensor(tensor, "reducescatter_async")
    return _call(tensor, name, op, process_set, prescale_factor, postscale_factor).start()


@refused_on_every_rank
def grouped_reducescatter(
    tensors: Iterable[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """Combine and divide each of several tensors as ``reducescatter`` does, in one operation.

    Args:
        tensors: dense tensors, equal on all ranks in number, shapes and dtypes.
        name: name of the call, which is compared between ranks and shown in messages.
        compression: how the tensors are compressed while they are sent.
        op: how values are combined, as for ``reducescatter``.
        process_set: the participating ranks.
        prescale_factor: factor by which the tensors are multiplied before they are combined.
        postscale_factor: factor by which the results are multiplied.
    """
    tensors = check_tensors(tensors, "grouped_reducescatter", has_gradient=True)
    return _scattered(
        "grouped_reducescatter", tensors, name, compression, op, process_set, prescale_factor, postscale_factor
    )


@refused_on_every_rank
def grouped_reducescatter_async(
    tensors: Iterable[torch.Tensor],
    name: str | None = None,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle[list[torch.Tensor]]:
    """Start a ``grouped_reducescatter`` in the background, without a gradient, and return its handle."""
    tensors = check_tensors(tensors, "grouped_reducescatter_async")
    return _grouped_call(tensors, name, op, process_set, prescale_factor, postscale_factor).start()


def _scattered(
    function: str,
    tensors: Sequence[torch.Tensor],
    name: str | None,
    compression: type[Compressor],
    op: Op,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
) -> list[torch.Tensor]:
    """Combine and divide tensors, compressed while they are sent, with a gradient."""
    if needs_gradient(tensors):
        check_has_gradient(function, op)
    options = (name, op, process_set, prescale_factor, postscale_factor)

    def forward(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if function == "reducescatter":
            return [_call(given[0], *options).run()]
        return _grouped_call(given, *options).run()

    def backward(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        factor = prescale_factor * postscale_factor * (transport_of(process_set).size if op is Sum else 1)
        return grouped_allgather([gradient * factor for gradient in gradients], process_set=process_set)

    return compressed_with_gradient(forward, backward, tensors, compression)


def _call(
    tensor: torch.Tensor,
    name: str | None,
    op: Op,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
) -> TensorCall[torch.Tensor]:
    device = tensor.device
    collective = operations.reducescatter_call(
        as_array(host_of(tensor)),
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    )
    return TensorCall(collective, lambda array: new_tensor(array).to(device))


def _grouped_call(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    op: Op,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
) -> TensorCall[list[torch.Tensor]]:
    devices = [tensor.device for tensor in tensors]
    collective = operations.grouped_reducescatter_call(
        [as_array(host_of(tensor)) for tensor in tensors],
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    )
    return TensorCall(
        collective,
        lambda parts: [new_tensor(array).to(device) for array, device in zip(parts, devices, strict=True)],
    )
