"""Jobs of Lentando and of its peers, which no one process can hold: how each is started, here or on a cluster."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measuring import Sample
from tqdm import tqdm

__all__ = [
    "HOROVOD_OVER_MPI",
    "OURS",
    "HostGroup",
    "alternate",
    "found_here",
    "program_on",
    "run_job",
    "run_on",
    "take_turns",
]

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
MPICH = Path(sys.prefix, "mpich/bin")
OURS = "Lentando"
HOROVOD_OVER_MPI = "Horovod over MPI"
PROGRAMS = {OURS: "lentando", "Open MPI": "mpi", "MPICH": "mpi", "Gloo": "gloo", "Horovod": "horovod"}
PROGRAMS[HOROVOD_OVER_MPI] = "horovod"
"""What the programs below ``peers/`` call each library."""
OPEN_MPI_5 = "--binding-args=--bind-to none --map-by slot:oversubscribe"
"""For horovodrun, which would pass options that Open MPI 5 does not know."""
PAYLOAD = 1448 / 1514
"""What TCP carries of the Ethernet frames that a link's limit counts."""
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
JOB_SECONDS = 300


@dataclass(frozen=True)
class HostGroup:
    """The hosts on which the ranks of a job run.

    Attributes:
        hosts: number of them; 0 is this machine, without links.
        slots: ranks on each.
        rate: speed of each link, in bits per second.
    """

    hosts: int
    slots: int
    rate: float = 0.0

    @property
    def ranks(self) -> int:
        return max(self.hosts, 1) * self.slots

    def __str__(self) -> str:
        if not self.hosts:
            return f"{self.slots} ranks on one node"
        each = "a rank" if self.slots == 1 else f"{self.slots} ranks"
        return f"{each} on each of {self.hosts} hosts, {self.rate / 1e9:g} Gbit/s"

    def link_seconds(self, size: float) -> float:
        """What so many bytes take on a link at least."""
        return size * 8 / (self.rate * PAYLOAD)

    def limit_seconds(self, size: int) -> float:
        """An all-reduce of so many bytes: 2(N - 1)/N of them through each link, in each direction."""
        return self.link_seconds(2 * (self.hosts - 1) / self.hosts * size)

    def command(self, library: str, program: str, arguments: Sequence[str]) -> list[str]:
        """The job in which ``library`` runs a program of ``peers/``."""
        python = str(MPICH / "python") if library == "MPICH" else sys.executable
        work = [python, str(HERE / "peers" / program), PROGRAMS[library], *arguments]
        count = ["-np", str(self.ranks)]
        if library == "MPICH":
            job = [str(MPICH / "mpiexec"), *count, *work]
        elif library == "Horovod":
            hosts = ",".join(f"h{host}:{self.slots}" for host in range(self.hosts))
            where = ["-H", hosts, "--network-interfaces", "eth0"] if self.hosts else []
            job = [str(BIN / "horovodrun"), "--gloo", *count, *where, *work]
        elif library == HOROVOD_OVER_MPI:
            job = [str(BIN / "horovodrun"), "--mpi", *count, OPEN_MPI_5, *work]
        elif library != "Gloo":
            job = [str(BIN / "mpirun"), *count, *work]
        elif self.hosts:
            job = work
        else:
            job = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", *count[1:], *work[1:]]
        if not self.hosts:
            return job
        cluster = [sys.executable, str(HERE / "cluster"), "run", "--hosts", str(self.hosts), "--slots", str(self.slots)]
        each = ["--each"] if library == "Gloo" else []
        return [*cluster, "--rate", f"{self.rate:.0f}bit", *each, "--", *job]


def found_here() -> list[str]:
    """The libraries that this machine has."""
    here = {
        OURS: True,
        "Open MPI": True,
        "MPICH": (MPICH / "mpiexec").exists(),
        "Gloo": find_spec("torch") is not None,
        "Horovod": find_spec("horovod") is not None,
    }
    return [name for name, there in here.items() if there]


def program_on(ranks: int, program: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a program of this folder on ranks of this machine."""
    return [str(BIN / "mpirun"), "-np", str(ranks), sys.executable, str(HERE / program), *arguments]


def run_on(ranks: int, program: str, arguments: Sequence[str]) -> None:
    """Run a program of this folder on ranks of this machine; it prints its results."""
    command = program_on(ranks, program, arguments)
    subprocess.run(command, env={**ENVIRONMENT, **os.environ}, timeout=JOB_SECONDS, check=True)


def take_turns(
    group: HostGroup, libraries: Sequence[str], program: str, arguments: Mapping[str, Sequence[str]], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """By library, then by repeat: the JSON that the program printed. The jobs take turns, forwards and backwards.

    Raises:
        SystemExit: with all output of a job, if it fails.
    """
    by_library: dict[str, list[dict[str, Any]]] = {name: [] for name in libraries}
    with tqdm(total=repeats * len(libraries), desc=str(group), leave=False) as progress:
        for repeat in range(repeats):
            for name in libraries if repeat % 2 else reversed(libraries):
                by_library[name].append(run_job(group.command(name, program, arguments[name])))
                progress.update()
    return by_library


def alternate(
    group: HostGroup, libraries: Sequence[str], program: str, arguments: Mapping[str, Sequence[str]], repeats: int
) -> dict[str, dict[str, Sample]]:
    """By library, then by what the program calls its figures: seconds. See ``take_turns``."""
    by_library = take_turns(group, libraries, program, arguments, repeats)
    return {
        name: {figure: Sample(tuple(each[figure] for each in found)) for figure in found[0]}
        for name, found in by_library.items()
    }


def run_job(command: Sequence[str], limit_seconds: float = JOB_SECONDS) -> dict[str, Any]:
    """The JSON that a job prints.

    Raises:
        SystemExit: with all output of the job, if it fails.
    """
    done = subprocess.run(
        command, env={**ENVIRONMENT, **os.environ}, capture_output=True, text=True, timeout=limit_seconds, check=False
    )
    report = re.search(r"\{.*\}", done.stdout)  # horovodrun writes the rank in front
    if done.returncode or report is None:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(report[0])
    return found
