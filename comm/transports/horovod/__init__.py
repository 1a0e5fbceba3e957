"""The transport over Horovod, for jobs that horovodrun starts without MPI."""

from lentando.comm.transports.horovod.transport import HorovodTransport

__all__ = ["HorovodTransport"]
