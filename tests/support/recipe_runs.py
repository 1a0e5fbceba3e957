"""Recipes and commands of examples/, started as a user starts them: alone, or under mpirun, killed and resumed."""

import re
import subprocess
import sys
from pathlib import Path

from launching import Job, mpirun

KILLED = str(Path(__file__).parent / "killed_recipe.py")
LIMIT_SECONDS = 250.0


def alone(*command: str) -> str:
    """What a program prints that ends well."""
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def weights(output: str) -> str:
    """The checksum of the weights at the end of training."""
    (found,) = re.findall(r"weights (\w{8})", output)
    return str(found)


def finished(job: Job) -> str:
    """The output of a job that ended well."""
    assert job.status == 0, job.output
    return job.output


def resumed_after_a_kill(size: int, rank: int, batches: int, recipe: str, *saving: str) -> str:
    """What a recipe prints when it is resumed after one rank has killed itself behind so many batches."""
    killed = mpirun(size, KILLED, str(rank), str(batches), recipe, *saving, timeout_seconds=LIMIT_SECONDS)
    assert killed.status not in (0, None), killed.output
    return finished(mpirun(size, recipe, *saving, "--resume", timeout_seconds=LIMIT_SECONDS))
