"""What is wrong with the job: what its launchers say, what the transport sees, and what came of joining it."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from lentando.cli.doctor.checks import install_line, matching_mpirun, way_to_load
from lentando.cli.doctor.facts import Facts, family
from lentando.cli.doctor.findings import Finding, merged, note, ok, problem
from lentando.cli.doctor.joining import Outcome
from lentando.cli.doctor.networks import first_outward
from lentando.cli.quantities import format_bandwidth, format_bytes, format_seconds
from lentando.comm.errors import grouped_by_rank
from lentando.comm.launch import Claim, read_claims

__all__ = ["check_claims", "check_outcome", "check_tests", "stranger"]

TUNING = ("OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_", "MPIR_CVAR_", "FI_", "UCX_", "I_MPI_")
"""How the names of variables begin that change what MPI does."""
SET_BY_MPIRUN = {"OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs"}
"""Those that begin so and are nobody's wish."""


def check_claims(by_rank: dict[int, Facts]) -> list[Finding]:
    """What launchers told each rank, whether they agree, and whether the transport agrees."""
    return merged({rank: _check_rank(facts) for rank, facts in by_rank.items()})


def check_outcome(outcome: Outcome, facts: Facts) -> list[Finding]:
    """What came of joining, as this rank saw it."""
    what = f"while {outcome.stage}" if outcome.stage.endswith("job") else f"during {outcome.stage}"
    said = f" It said: {' / '.join(outcome.last_words)}" if outcome.last_words else ""
    if outcome.end == "left":
        return []
    if outcome.end == "refused":
        assert outcome.refusal is not None
        return [problem("job", outcome.refusal, _way_to_start(facts))]
    if words := stranger(facts):
        text = f"{words}, and the rank {_ending(outcome)} {what}.{said}"
        return [problem("job", text, _way_to_start(facts))]
    if outcome.end == "hung":
        text = (
            f"no answer {what} within {outcome.waited_seconds:.0f} s. Another rank has not come there (did it start?), "
            f"or MPI chose a network that does not join the hosts.{said}"
        )
        return [problem("job", text, _way_to_connect(facts))]
    return [problem("job", f"the rank {_ending(outcome)} {what}.{said}", _way_to_default(facts))]


def check_tests(outcome: Outcome, own: str | None) -> list[Finding]:
    """What the all-reduce of each transport did. ``own`` is the one by which the job runs."""
    findings = [*_check_thread_level(outcome)]
    for name, tests in outcome.tests.items():
        prefix = f"transport {name}: "
        errors = [test.get("error") for test in tests]
        if any(errors):
            first_words = [(error or "opens").partition(". ")[0] for error in errors]
            text = grouped_by_rank(first_words) if len(set(first_words)) > 1 else first_words[0]
            findings.append(ok("transports", f"{prefix}not used, and does not open here: {text}"))
        elif not all(test["is_right"] for test in tests):
            wrong = [
                "right" if test["is_right"] else f"{test['found']:g} in place of {test['expected']:g}" for test in tests
            ]
            text = f"{prefix}the all-reduce gives wrong sums ({grouped_by_rank(wrong)})"
            findings.append(
                problem("transports", text, f"unset {' '.join(_tuning_of(outcome)) or 'LENTANDO_TRANSPORT'}")
            )
        else:
            findings.append(ok("transports", prefix + _rate(tests) + (", chosen for this job" if name == own else "")))
    return findings


def _check_rank(facts: Facts) -> list[Finding]:
    environment, place = facts["environment"], facts["place"]
    claims = read_claims(environment)
    shown = [claim for claim in claims if claim.size is not None or not claim.is_complete] or claims
    findings = [_check_claim(claim) for claim in shown]
    certain = [claim for claim in claims if claim.is_complete]
    for other in _contradicting(claims):
        text = f"two launchers disagree about this rank: {_said(certain[0])}, {_said(other)}"
        findings.append(problem("launcher", text, f"unset {' '.join(other.variables)}"))
    if place is None:
        return findings or [ok("launcher", "none: started alone")]
    seen = f"transport {place['transport']} sees rank {place['rank']} of {place['size']}"
    forced = environment.get("LENTANDO_TRANSPORT")
    by = f" (LENTANDO_TRANSPORT={forced})" if forced else ""
    findings.append(ok("launcher", f"{seen}, {place['local_rank']} of {place['local_size']} on {facts['host']}{by}"))
    if certain and (certain[0].rank != place["rank"] or certain[0].size not in (None, place["size"])):
        text = f"{_said(certain[0])}, but {seen}{by}"
        findings.append(
            note("launcher", text, "unset LENTANDO_TRANSPORT")
            if forced
            else problem("launcher", text, f"unset {' '.join(certain[0].variables)}")
        )
    return findings


def _contradicting(claims: Sequence[Claim]) -> list[Claim]:
    """Those that give this process another place than the launcher that is trusted most."""
    certain = [claim for claim in claims if claim.is_complete]
    if not certain:
        return []
    first = certain[0]
    return [
        other
        for other in certain[1:]
        # srun may have started mpirun or a shell, and a job of one may have started others.
        if other.launcher != "srun" and 1 not in (first.size, other.size)
        if other.rank != first.rank or (None not in (first.size, other.size) and first.size != other.size)
    ]


def _check_claim(claim: Claim) -> Finding:
    if claim.is_complete:
        return ok("launcher", _said(claim))
    told = ", ".join(f"{name}={value}" for name, value in claim.variables.items())
    text = f"{claim.launcher} left {told}: a rank and a number of ranks were expected"
    return problem("launcher", text, f"unset {' '.join(claim.variables)}")


def _said(claim: Claim) -> str:
    size = "" if claim.size is None else f" of {claim.size}"
    told = ", ".join(f"{name}={value}" for name, value in claim.variables.items())
    return f"{claim.launcher} says rank {claim.rank}{size} ({told})"


def stranger(facts: Facts) -> str | None:
    """That the launcher and the library are of two MPIs, if they are."""
    library = facts["library"]
    launchers = [claim for claim in read_claims(facts["environment"]) if claim.mpi]
    if not launchers or library["vendor"] is None:
        return None
    claim = launchers[0]
    if claim.launcher == "srun" or "PMIx" in claim.launcher:
        plugin = facts["environment"].get("SLURM_MPI_TYPE", "")
        strange = family(library["vendor"]) == "MPICH" and plugin.startswith("pmix")
    else:
        strange = family("Open MPI" if "Open MPI" in claim.launcher else "MPICH") != family(library["vendor"])
    if not strange:
        return None
    path = f" ({library['path']})" if library["path"] else ""
    return (
        f"{_said(claim)}, but the library here is {library['vendor']} {library['version']}{path}, which does not "
        "understand that launcher"
    )


def _ending(outcome: Outcome) -> str:
    if outcome.end == "hung":
        return f"gave no answer within {outcome.waited_seconds:.0f} s"
    if outcome.end == "ended":
        return "was ended by the launcher"
    status = outcome.status or 0
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _way_to_start(facts: Facts) -> str:
    """A command line whose ranks would find each other."""
    claims = read_claims(facts["environment"])
    for claim in claims:
        if not claim.is_complete:
            return f"unset {' '.join(claim.variables)}"
    for claim in _contradicting(claims):
        return f"unset {' '.join(claim.variables)}"
    if "LENTANDO_TRANSPORT" in facts["environment"] and not claims:
        return "unset LENTANDO_TRANSPORT"
    vendor = facts["library"]["vendor"]
    if vendor is None:
        return way_to_load(facts)
    size = next((claim.size for claim in claims if claim.size), 1)
    if "SLURM_STEP_NUM_TASKS" in facts["environment"]:
        plugin = "pmix" if family(vendor) == "Open MPI" else "pmi2"
        return f"srun --ntasks={size} --mpi={plugin} lentando doctor"
    matching = matching_mpirun(facts)
    if matching is None:
        return install_line(vendor)
    name = PurePath(matching["path"]).name if matching["on_path"] else matching["path"]
    return f"{name} -np {size} lentando doctor"


def _way_to_connect(facts: Facts) -> str:
    name = first_outward(facts["interfaces"]) or "lo"
    vendor = facts["library"]["vendor"]
    if vendor is not None and family(vendor) == "MPICH":
        return f"export FI_TCP_IFACE={name} UCX_NET_DEVICES={name}"
    return f"export OMPI_MCA_btl_tcp_if_include={name} PRTE_MCA_prte_if_include={name}"


def _way_to_default(facts: Facts) -> str:
    tuning = _tuning(facts)
    if tuning:
        return f"unset {' '.join(tuning)}"
    return "python -m mpi4py --mpi-lib-version && python -m mpi4py.bench helloworld"


def _tuning(facts: Facts) -> list[str]:
    return [name for name in facts["environment"] if name.startswith(TUNING) and name not in SET_BY_MPIRUN]


def _tuning_of(outcome: Outcome) -> list[str]:
    return sorted({name for facts in outcome.everyone or [] for name in _tuning(facts)})


def _check_thread_level(outcome: Outcome) -> list[Finding]:
    by_rank: dict[int, list[Finding]] = {}
    for tests in outcome.tests.values():
        for rank, test in enumerate(tests):
            level = test.get("thread_level")
            if level == "MULTIPLE":
                by_rank[rank] = [ok("MPI", "thread level MULTIPLE: messages progress while the model computes")]
            elif level is not None:
                text = f"thread level {level}: messages progress only while the model waits for them"
                by_rank[rank] = [note("MPI", text, "export MPI4PY_RC_THREAD_LEVEL=multiple")]
    return merged(by_rank)


def _rate(tests: Sequence[dict[str, Any]]) -> str:
    size = tests[0]["size"]
    timed = [test["seconds"] for test in tests if test["seconds"] is not None]
    if not timed:
        return "opens, and sums right; a world of 1 sends nothing"
    slowest = max(timed)
    size_bytes = tests[0]["bytes"]
    return (
        f"all-reduce of {format_bytes(size_bytes)} over {size} ranks sums right, in {format_seconds(slowest)} "
        f"({format_bandwidth(size_bytes / slowest)})"
    )
