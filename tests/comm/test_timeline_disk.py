"""A timeline whose disk is full ends with what fits, and leaves the job in peace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys, time
import numpy as np
from lentando.comm import operations, timeline, world
from lentando.comm.operations import Sum

world.init()
operations.start_timeline(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # a write beyond it is cut short, the next is an error
for number in range(100):
    operations.allreduce(np.ones(1), Sum, f"loss {number}")
    if sys.argv[2] == "while it is recorded" and number == 50:
        time.sleep(10 * timeline.WRITE_SECONDS)
world.shutdown()
print("done")
"""


@pytest.mark.parametrize("when", ["while it is recorded", "at the end"])
def test_full_disk_ends_the_timeline_but_not_the_job(when: str, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    job = subprocess.run([sys.executable, "-c", PROGRAM, str(path), when], text=True, capture_output=True, check=False)
    assert job.returncode == 0, job.stderr
    assert job.stdout == "done\n"
    assert job.stderr.count("rank 0 cannot write its timeline any more (File too large)") == 1
    assert "Traceback" not in job.stderr
    names = [event["name"] for event in json.loads(path.read_text())]
    assert names[:2] == ["thread_name", "process_name"]
    assert names.count("ALLREDUCE") < 100
