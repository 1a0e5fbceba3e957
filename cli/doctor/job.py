"""Findings about the job: claims of launchers, the view of the transport, and the outcome of the probe."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from lentando.cli.doctor.checks import install_command, loading_fix, matching_mpirun
from lentando.cli.doctor.facts import Facts, family
from lentando.cli.doctor.findings import Finding, merged, note, ok, problem
from lentando.cli.doctor.networks import first_outward
from lentando.cli.doctor.watch import Outcome
from lentando.cli.quantities import format_bandwidth, format_bytes, format_seconds
from lentando.comm.claims import Claim, read_claims
from lentando.comm.errors import grouped_by_rank

__all__ = ["check_claims", "check_outcome", "check_tests", "launcher_mismatch"]

TUNING = ("OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "MPIR_CVAR_", "FI_", "UCX_", "I_MPI_")
"""Prefixes of variables that change how MPI works."""
SET_BY_MPIRUN = {"OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs"}
"""Variables with these prefixes that mpirun itself sets."""


def check_claims(by_rank: dict[int, Facts]) -> list[Finding]:
    """Return findings on what launchers claim about each rank, and whether they and the transport agree."""
    return merged({rank: _check_rank(facts) for rank, facts in by_rank.items()})


def check_outcome(outcome: Outcome, facts: Facts) -> list[Finding]:
    """Return findings on the outcome of the probe of this rank."""
    stage = f"while {outcome.stage}" if outcome.stage.endswith("job") else f"during {outcome.stage}"
    output = f" Its last output: {' / '.join(outcome.last_output)}" if outcome.last_output else ""
    if outcome.end == "left":
        return []
    if outcome.end == "refused":
        assert outcome.refusal is not None
        return [problem("job", outcome.refusal, _start_command(facts))]
    if mismatch := launcher_mismatch(facts):
        text = f"{mismatch}, and the rank {_ending(outcome)} {stage}.{output}"
        return [problem("job", text, _start_command(facts))]
    if outcome.end == "hung":
        text = (
            f"no answer {stage} within {outcome.waited_seconds:.0f} s. Either another rank has not reached this point "
            f"(did it start?), or MPI chose a network that does not connect the hosts.{output}"
        )
        return [problem("job", text, _interface_fix(facts))]
    return [problem("job", f"the rank {_ending(outcome)} {stage}.{output}", _tuning_fix(facts))]


def check_tests(outcome: Outcome, chosen: str | None) -> list[Finding]:
    """Return findings on the all-reduce of each transport; ``chosen`` is the transport of the job."""
    findings = [*_check_thread_level(outcome)]
    for name, tests in outcome.tests.items():
        prefix = f"transport {name}: "
        errors = [test.get("error") for test in tests]
        if any(errors):
            reasons = [(error or "opens").partition(". ")[0] for error in errors]
            text = grouped_by_rank(reasons) if len(set(reasons)) > 1 else reasons[0]
            findings.append(ok("transports", f"{prefix}not used, and cannot be opened here: {text}"))
        elif not all(test["is_right"] for test in tests):
            wrong = [
                "right" if test["is_right"] else f"{test['found']:g} instead of {test['expected']:g}" for test in tests
            ]
            text = f"{prefix}the all-reduce gives wrong sums ({grouped_by_rank(wrong)})"
            findings.append(
                problem("transports", text, f"unset {' '.join(_tuning_of(outcome)) or 'LENTANDO_TRANSPORT'}")
            )
        else:
            findings.append(
                ok("transports", prefix + _rate(tests) + (", chosen for this job" if name == chosen else ""))
            )
    return findings


def _check_rank(facts: Facts) -> list[Finding]:
    environment, place = facts["environment"], facts["place"]
    claims = read_claims(environment)
    shown = [claim for claim in claims if claim.size is not None or not claim.is_complete] or claims
    findings = [_check_claim(claim) for claim in shown]
    certain = [claim for claim in claims if claim.is_complete]
    for claim in _contradicting(claims):
        text = f"two launchers disagree about this rank: {_described(certain[0])}, {_described(claim)}"
        findings.append(problem("launcher", text, f"unset {' '.join(claim.variables)}"))
    if place is None:
        return findings or [ok("launcher", "none: started alone")]
    view = f"transport {place['transport']} sees rank {place['rank']} of {place['size']}"
    forced = environment.get("LENTANDO_TRANSPORT")
    by = f" (LENTANDO_TRANSPORT={forced})" if forced else ""
    findings.append(ok("launcher", f"{view}, {place['local_rank']} of {place['local_size']} on {facts['host']}{by}"))
    if certain and (certain[0].rank != place["rank"] or certain[0].size not in (None, place["size"])):
        text = f"{_described(certain[0])}, but {view}{by}"
        findings.append(
            note("launcher", text, "unset LENTANDO_TRANSPORT")
            if forced
            else problem("launcher", text, f"unset {' '.join(certain[0].variables)}")
        )
    return findings


def _contradicting(claims: Sequence[Claim]) -> list[Claim]:
    """Return claims that give this process another rank or size than the most trusted launcher does."""
    certain = [claim for claim in claims if claim.is_complete]
    if not certain:
        return []
    first = certain[0]
    return [
        claim
        for claim in certain[1:]
        # srun may have started mpirun or a shell, and a job of one rank may have started other jobs.
        if not claim.kind.starts_launchers and 1 not in (first.size, claim.size)
        if claim.rank != first.rank or (None not in (first.size, claim.size) and first.size != claim.size)
    ]


def _check_claim(claim: Claim) -> Finding:
    if claim.is_complete:
        return ok("launcher", _described(claim))
    variables = ", ".join(f"{name}={value}" for name, value in claim.variables.items())
    text = f"{claim.launcher} set {variables}: expected a rank and a number of ranks"
    return problem("launcher", text, f"unset {' '.join(claim.variables)}")


def _described(claim: Claim) -> str:
    size = "" if claim.size is None else f" of {claim.size}"
    variables = ", ".join(f"{name}={value}" for name, value in claim.variables.items())
    return f"{claim.launcher} says rank {claim.rank}{size} ({variables})"


def launcher_mismatch(facts: Facts) -> str | None:
    """Return a description of launcher and library if they belong to different MPIs, else None."""
    library = facts["library"]
    launchers = [claim for claim in read_claims(facts["environment"]) if claim.mpi]
    if not launchers or library["vendor"] is None:
        return None
    claim = launchers[0]
    if claim.kind.family == "any":
        plugin = facts["environment"].get("SLURM_MPI_TYPE", "")
        is_mismatch = family(library["vendor"]) == "MPICH" and plugin.startswith("pmix")
    else:
        is_mismatch = claim.kind.family != family(library["vendor"])
    if not is_mismatch:
        return None
    path = f" ({library['path']})" if library["path"] else ""
    return (
        f"{_described(claim)}, but the library here is {library['vendor']} {library['version']}{path}, which does not "
        "work with that launcher"
    )


def _ending(outcome: Outcome) -> str:
    if outcome.end == "hung":
        return f"gave no answer within {outcome.waited_seconds:.0f} s"
    if outcome.end == "ended":
        return "was ended by the launcher"
    status = outcome.status or 0
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _start_command(facts: Facts) -> str:
    """Return a command that starts ranks which find each other."""
    claims = read_claims(facts["environment"])
    for claim in claims:
        if not claim.is_complete:
            return f"unset {' '.join(claim.variables)}"
    for claim in _contradicting(claims):
        return f"unset {' '.join(claim.variables)}"
    if "LENTANDO_TRANSPORT" in facts["environment"] and not claims:
        return "unset LENTANDO_TRANSPORT"
    if claims and claims[0].kind.is_torch and "torch" not in facts["versions"]:
        return "pip install torch"
    vendor = facts["library"]["vendor"]
    if vendor is None:
        return loading_fix(facts)
    size = next((claim.size for claim in claims if claim.size), 1)
    for command in (claim.kind.command for claim in claims if claim.kind.command):
        plugin = "pmix" if family(vendor) == "Open MPI" else "pmi2"
        return f"{command.format(size=size, plugin=plugin)} lentando doctor"
    matching = matching_mpirun(facts)
    if matching is None:
        return install_command(vendor)
    name = PurePath(matching["path"]).name if matching["on_path"] else matching["path"]
    return f"{name} -np {size} lentando doctor"


def _interface_fix(facts: Facts) -> str:
    name = first_outward(facts["interfaces"]) or "lo"
    claims = read_claims(facts["environment"])
    if claims and claims[0].kind.is_torch:
        return f"export GLOO_SOCKET_IFNAME={name}"
    vendor = facts["library"]["vendor"]
    if vendor is not None and family(vendor) == "MPICH":
        return f"export FI_TCP_IFACE={name} UCX_NET_DEVICES={name}"
    return f"export OMPI_MCA_btl_tcp_if_include={name} PRTE_MCA_prte_if_include={name}"


def _tuning_fix(facts: Facts) -> str:
    tuning = _tuning(facts)
    if tuning:
        return f"unset {' '.join(tuning)}"
    return "python -m mpi4py --mpi-lib-version && python -m mpi4py.bench helloworld"


def _tuning(facts: Facts) -> list[str]:
    return [name for name in facts["environment"] if name.startswith(TUNING) and name not in SET_BY_MPIRUN]


def _tuning_of(outcome: Outcome) -> list[str]:
    return sorted({name for facts in outcome.facts_by_rank or [] for name in _tuning(facts)})


def _check_thread_level(outcome: Outcome) -> list[Finding]:
    by_rank: dict[int, list[Finding]] = {}
    for tests in outcome.tests.values():
        for rank, test in enumerate(tests):
            level = test.get("thread_level")
            if level == "MULTIPLE":
                by_rank[rank] = [ok("MPI", "thread level MULTIPLE: messages make progress while the model computes")]
            elif level is not None:
                text = f"thread level {level}: messages make progress only while the model waits for them"
                by_rank[rank] = [note("MPI", text, "export MPI4PY_RC_THREAD_LEVEL=multiple")]
    return merged(by_rank)


def _rate(tests: Sequence[dict[str, Any]]) -> str:
    size = tests[0]["size"]
    timed = [test["seconds"] for test in tests if test["seconds"] is not None]
    if not timed:
        return "opens, and its sum is correct; a single rank sends nothing"
    slowest = max(timed)
    size_bytes = tests[0]["bytes"]
    return (
        f"all-reduce of {format_bytes(size_bytes)} over {size} ranks is correct, in {format_seconds(slowest)} "
        f"({format_bandwidth(size_bytes / slowest)})"
    )
