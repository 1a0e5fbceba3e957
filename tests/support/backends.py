"""What the backend of the job that runs a test can do. Imported on ranks only."""

import pytest

from lentando.comm.capabilities import Subsets
from lentando.comm.world import size, transport

__all__ = ["needs_process_sets"]

needs_process_sets = pytest.mark.skipif(
    size() > 1 and not isinstance(transport(), Subsets), reason="the backend has no process sets"
)
