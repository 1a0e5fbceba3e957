"""Lentando: train one model on many workers while talking less.

``import lentando.torch as lt`` is the usual entry. Importing this package loads no framework and no MPI.
"""

from lentando.comm.errors import LentandoError

__all__ = ["LentandoError", "__version__"]

__version__ = "0.1.0"
