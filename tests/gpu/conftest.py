"""Tests on a real GPU: ``make gpu``, or ``tests/gpu/run.sh``. Without one they are skipped, and say so.

With LENTANDO_GPU_DRY_RUN=1 they run without one, so that a mistake in the tests is found before the day on which there
is a GPU: over the stand-ins for CuPy and NCCL in one process, and on the CPU where they start jobs.
"""

import os
import sys

import device_arrays
import pytest
import torch

from lentando.comm.transports.nccl_binding import NCCLBinding

IS_DRY_RUN = os.environ.get("LENTANDO_GPU_DRY_RUN") == "1"


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    if IS_DRY_RUN:
        sys.modules["cupy"] = device_arrays
        return
    problem = NCCLBinding().problem()
    if problem is not None:
        pytest.skip(f"needs a GPU, CuPy and nccl4py: {problem}")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch's CUDA build")


@pytest.fixture(scope="session")
def dry_run() -> bool:
    """Whether there is no GPU, and stand-ins take its place."""
    return IS_DRY_RUN


@pytest.fixture
def only_on_a_gpu(dry_run: bool) -> None:
    """Skips what stand-ins cannot show."""
    if dry_run:
        pytest.skip("a dry run: only a GPU can show this")
