"""How many files a reader opens to follow one ``SlowMo.step()``: it may become fewer, and not more.

``docs/architecture.md`` says which they are, and why each is needed.
"""

import re
from pathlib import Path

import pytest
from launching import mpirun

COUNTING = Path(__file__).parents[2] / ".ci/count_step.py"
OF_A_TRANSPORT = ("comm/transports/", "comm/reductions/", "comm/extremes", "comm/pieces", "comm/transport.py")
"""Files below the interfaces of transports and reductions, which differ by backend."""


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_opens_few_files(size: int) -> None:
    job = mpirun(size, str(COUNTING), prepared="lentando.torch")
    assert job.status == 0, job.output
    found = {
        title: [line.split(":")[0].strip() for line in lines.splitlines()]
        for title, lines in re.findall(r"^(\w[\w ]+): \d+ files .*\n((?:    .*\n)+)", job.output, re.MULTILINE)
    }
    above = [name for name in found["at an outer step"] if not name.startswith(OF_A_TRANSPORT)]
    assert len(found["between outer steps"]) <= 4, found["between outer steps"]
    assert len(above) <= (23 if size == 1 else 24), above
    assert sum(name.startswith("optimizers/replica/") for name in above) <= (5 if size == 1 else 6), above
    if size == 1:
        assert len(found["with the loss"]) <= 5, found["with the loss"]
