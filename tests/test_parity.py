"""PyTorch and TensorFlow train the same model, under a real mpirun."""

import re

import pytest
from launching import PYTEST, RANKS, mpirun


@pytest.mark.parametrize("size", [2, 4])
def test_both_frameworks_give_the_same_weights(size: int) -> None:
    job = mpirun(size, *PYTEST, str(RANKS / "parity/both_frameworks.py"), timeout_seconds=280)
    assert job.status == 0, job.output
    assert int(re.findall(r"(\d+) passed", job.output)[0]) > 20, job.output
