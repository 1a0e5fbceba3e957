"""Horovod's engine as a transport, for jobs that horovodrun starts without MPI."""

from lentando.comm.transports.horovod.transport import HorovodTransport

__all__ = ["HorovodTransport"]
