"""The name ``horovod``, for Horovod's own tests: every module below it takes its functions from Lentando.

Only what the tests import is here. Put this file's parent folder on PYTHONPATH.
"""

__version__ = "0.28.1"
