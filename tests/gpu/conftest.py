"""Tests on a real GPU: ``make gpu``. Without one they are skipped, and say so."""

import pytest
import torch

from lentando.comm.transports.nccl_binding import NCCLBinding


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    problem = NCCLBinding().problem()
    if problem is not None:
        pytest.skip(f"needs a GPU, CuPy and nccl4py: {problem}")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch's CUDA build")
