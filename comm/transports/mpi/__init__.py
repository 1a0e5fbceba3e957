"""MPI as a transport: the usual one, one whose ranks may die, one for a second thread. Loads MPI."""

from lentando.comm.transports.mpi.transport import MPITransport

__all__ = ["MPITransport"]
