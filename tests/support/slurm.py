"""A Slurm cluster of one node, this machine, for as long as a test lasts: its own munged, slurmctld and slurmd.

Everything that is started has ``SLURM_CONF`` of this cluster in its environment, jobs included, and is found by it when
the cluster ends. Debian's packages: ``apt-get install slurmctld slurmd slurm-client munge``, and ``libpmix-dev`` for
``srun --mpi=pmix`` (the plugin opens libpmix.so by a name that only the development package has).
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from launching import Job, launch
from ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
CPUS = 4
"""What the node says that it has, so that four ranks have a place on any machine."""
START_SECONDS = 20.0
GRACE_SECONDS = 5.0

# The node has the host's name: to Open MPI, PMIx's name for a host and the host's own are two hosts where they differ.
CONFIGURATION = """
ClusterName=lentando
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/backfill
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of one's own needs root"
    absent = [program for program in PROGRAMS if _find(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge (libpmix-dev for pmix)"
    return None


@dataclass(frozen=True)
class Cluster:
    """One node.

    Attributes:
        folder: its state, logs and sockets.
        variables: what a command needs in its environment.
        daemons: those that were started.
    """

    folder: Path
    variables: Mapping[str, str]
    daemons: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def run(
        self, *command: str, timeout_seconds: float = 60.0, environment: Mapping[str, str | None] | None = None
    ) -> Job:
        """Run a command that talks to this cluster: ``run("srun", "-n", "4", "--mpi=pmi2", "hostname")``."""
        return launch(command, timeout_seconds, {**self.variables, **(environment or {})})

    def has_plugin(self, name: str) -> bool:
        """Whether ``srun --mpi=NAME`` can start anything: ``srun --mpi=list`` names some that cannot be loaded."""
        return self.run("srun", "-n", "1", f"--mpi={name}", "true", timeout_seconds=30).status == 0


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the daemons, wait until the node is idle, and end every process of the cluster afterwards.

    Raises:
        RuntimeError: if the node does not become idle; with what the daemons printed.
    """
    folder = Path(tempfile.mkdtemp(prefix="lentando-slurm-"))
    made = Cluster(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(_end, made)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        configuration = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            controller_port=free_port(),
            node_port=free_port(),
            cpus=CPUS,
        )
        (folder / "slurm.conf").write_text(configuration)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed")]
        # --force: a folder that only root may enter is no mistake where only root talks.
        _start(made, "munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *files)
        _wait_until((folder / "munge.socket").exists, made)
        _start(made, "slurmctld", "-D", "-i")
        _start(made, "slurmd", "-D")
        _wait_until(lambda: made.run("sinfo", "--noheader", "--format=%T").output.strip() == "idle", made)
        yield made


def _find(program: str) -> str | None:
    """Daemons live where the PATH of a user may not lead."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def _start(made: Cluster, program: str, *arguments: str) -> None:
    with (made.folder / f"{program}.log").open("wb") as log:
        daemon = subprocess.Popen(
            [str(_find(program)), *arguments],
            env={**os.environ, **made.variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    made.daemons.append(daemon)


def _wait_until(condition: Callable[[], bool], made: Cluster) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            reported = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(made.folder.glob("*.log")))
            raise RuntimeError(f"the Slurm node was not idle within {START_SECONDS} s\n{reported}")
        time.sleep(0.1)


def _end(made: Cluster) -> None:
    """End the daemons, each before those that it talks to, and whatever else has this cluster in its environment."""
    for daemon in reversed(made.daemons):
        daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(GRACE_SECONDS)
    deadline = time.monotonic() + GRACE_SECONDS
    while (alive := processes(made)) and time.monotonic() < deadline:
        for process in alive:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    for daemon in made.daemons:
        daemon.wait(GRACE_SECONDS)


def processes(made: Cluster) -> list[int]:
    """The numbers of all processes that belong to a cluster."""
    mark = f"SLURM_CONF={made.variables['SLURM_CONF']}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
