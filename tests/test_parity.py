"""PyTorch and TensorFlow train the same model, under a real mpirun. ``make parity`` reports by how much they differ."""

import re

from case_selection import thoroughly
from launching import PYTEST, RANKS, mpirun


@thoroughly
def test_both_frameworks_give_the_same_weights() -> None:
    job = mpirun(2, *PYTEST, str(RANKS / "parity/both_frameworks.py"), timeout_seconds=280)
    assert job.status == 0, job.output
    assert int(re.findall(r"(\d+) passed", job.output)[0]) > 20, job.output
