"""Transports over MPI: the usual one, an elastic one, and one for a second thread. Importing this loads MPI."""

from lentando.comm.transports.mpi.transport import MPITransport

__all__ = ["MPITransport"]
