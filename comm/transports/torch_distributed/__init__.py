"""The transport over process groups of torch.distributed, for jobs that torchrun starts without MPI."""

from lentando.comm.transports.torch_distributed.groups import Groups
from lentando.comm.transports.torch_distributed.transport import TorchTransport

__all__ = ["Groups", "TorchTransport"]
