"""The launchers that users have: how each starts Python on several ranks, and whether it is here.

`make horovod` builds Horovod and installs MPICH. Without it, tests that need them skip and say so, unless
LENTANDO_REQUIRE_LAUNCHERS=1 says that they must run.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import Job, find_mpirun, launch
from prepared_python import prepared_python

MPICH = Path(sys.prefix, "mpich/bin")
"""Where `make horovod` installs it: an environment of its own, because one Python finds one MPI."""
HOROVODRUN = Path(sys.executable).with_name("horovodrun")
HOROVODRUN_ALONE = (str(HOROVODRUN), "--disable-cache")
"""Without ~/.horovod/cache.bin, which fails to be read where another horovodrun has just begun to write it."""
# horovodrun spells them as Open MPI 4 did.
OPEN_MPI_5 = "--binding-args=--bind-to none --map-by slot:oversubscribe"


@dataclass(frozen=True)
class Launcher:
    """A way to start Python.

    Attributes:
        name: for messages.
        command: what comes before the number of ranks.
        python: the interpreter of its environment.
        options: what comes after the number of ranks.
        transport: what ranks then stand on.
        missing: why it cannot be used here; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    python: str
    options: tuple[str, ...]
    transport: str
    missing: str = ""

    def run(
        self,
        size: int,
        *arguments: str,
        timeout_seconds: float = 120.0,
        environment: Mapping[str, str | None] | None = None,
        prepared: str | None = None,
    ) -> Job:
        """``python ARGUMENTS`` on ``size`` ranks; skips the test if the launcher is missing.

        With ``prepared="lentando.torch"``, each rank has imported this module when it begins, and torchrun and
        horovodrun PyTorch (see ``prepared_python.py``). MPICH's ranks have not: they need the descriptor that its
        mpiexec has left open.
        """
        self.need()
        command, python = list(self.command), [self.python]
        if prepared is not None and self.python == sys.executable:
            python = prepared_python(prepared)
            if command[0] == sys.executable:
                command = [*prepared_python("lentando.torch"), *command[1:]]
            elif command[0] == str(HOROVODRUN):
                command = [*prepared_python("lentando.torch"), *command]
        command += [str(size), *self.options, *python, *arguments]
        return launch(command, timeout_seconds, {**NO_LAUNCHER, **(environment or {})})

    def need(self) -> None:
        """Skip the test, or fail it, if the launcher is missing."""
        if self.missing and os.environ.get("LENTANDO_REQUIRE_LAUNCHERS") == "1":
            pytest.fail(f"{self.missing}, and LENTANDO_REQUIRE_LAUNCHERS=1 asks for it")
        if self.missing:
            pytest.skip(self.missing)


@cache
def has_torch(launcher: Launcher) -> bool:
    """Whether PyTorch is installed where this launcher starts Python."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    return subprocess.run([launcher.python, "-c", code], check=False).returncode == 0


NO_LAUNCHER: dict[str, str | None] = {"LENTANDO_TRANSPORT": None, "HOROVOD_RANK": None, "HOROVOD_SIZE": None}

_without_horovod = "" if find_spec("horovod") and HOROVODRUN.exists() else "Horovod is not built here: make horovod"
_without_mpich = "" if (MPICH / "mpiexec").exists() else "MPICH is not installed here: make horovod"

OPEN_MPI = Launcher("mpirun (Open MPI)", (find_mpirun(), "-np"), sys.executable, (), "mpi")
WITH_MPICH = Launcher(
    "mpiexec (MPICH)", (str(MPICH / "mpiexec"), "-np"), str(MPICH / "python"), (), "mpi", _without_mpich
)
HOROVOD_GLOO = Launcher(
    "horovodrun --gloo", (*HOROVODRUN_ALONE, "--gloo", "-np"), sys.executable, (), "horovod", _without_horovod
)
HOROVOD_MPI = Launcher(
    "horovodrun --mpi", (*HOROVODRUN_ALONE, "--mpi", "-np"), sys.executable, (OPEN_MPI_5,), "mpi", _without_horovod
)
TORCHRUN = Launcher(
    "torchrun",
    (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"),
    sys.executable,
    ("--no-python",),
    "torch",
    "" if find_spec("torch") else "PyTorch is not installed here: pip install torch",
)
LAUNCHERS = (OPEN_MPI, WITH_MPICH, HOROVOD_GLOO, HOROVOD_MPI, TORCHRUN)
