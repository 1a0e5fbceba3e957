"""Recipes and commands of examples/, started as a user starts them: alone, or under mpirun, killed and resumed.

What a program imports first is imported already: see ``prepared_python.py``.
"""

import re
import subprocess
from pathlib import Path

from launching import Job, mpirun
from prepared_python import prepared_python

KILLED = str(Path(__file__).parent / "killed_recipe.py")
LIMIT_SECONDS = 250.0
MARIAN = "transformers.models.marian.modeling_marian"
"""The network of the translation recipe in PyTorch."""


def imported(program: str) -> str:
    """The modules whose import is most of the start of a program of examples/."""
    file = Path(program)
    if re.search("keras|tensorflow", file.name):
        return "lentando.tensorflow"
    return f"lentando.torch,{MARIAN}" if file.parent.name == "translation" else "lentando.torch"


def on_ranks(size: int, program: str, *arguments: str) -> Job:
    """A program under mpirun."""
    return mpirun(size, program, *arguments, timeout_seconds=LIMIT_SECONDS, prepared=imported(program))


def started(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A program without a launcher."""
    command = [*prepared_python(imported(program)), program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)


def alone(program: str, *arguments: str) -> str:
    """What a program prints, without a launcher, that ends well."""
    run = started(program, *arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout


def refused(program: str, *arguments: str, status: int = 1) -> str:
    """The reason that a program prints, without a launcher, before it ends with a status that is not 0."""
    run = started(program, *arguments)
    assert run.returncode == status, run.stdout + run.stderr
    return run.stderr


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
    arguments = (KILLED, str(rank), str(batches), recipe, *saving)
    killed = mpirun(size, *arguments, timeout_seconds=LIMIT_SECONDS, prepared=imported(recipe))
    assert killed.status not in (0, None), killed.output
    return finished(on_ranks(size, recipe, *saving, "--resume"))
