"""Errors of MPI, translated into those of Lentando."""

from collections.abc import Callable

from mpi4py import MPI

from lentando.comm.errors import TransportError

__all__ = ["TranslatedErrors"]


class TranslatedErrors:
    """A context that turns an error of MPI that is raised inside into one of Lentando.

    Args:
        translate: function that returns the error to raise instead.
    """

    def __init__(self, translate: Callable[[MPI.Exception], TransportError]) -> None:
        self._translate = translate

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MPI.Exception):
            raise self._translate(error) from error
