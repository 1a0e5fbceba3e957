"""What the environment variables of each launcher say of this process, and which of the launchers count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lentando.comm import launchers
from lentando.comm.launchers import Launcher

__all__ = ["Claim", "has_meeting_point", "is_of_step", "read_claims"]


@dataclass(frozen=True)
class Claim:
    """The values of one launcher's variables, whether or not they are valid.

    Attributes:
        kind: the launcher.
        variables: the variables for rank and size that are set, with their values.
        rank: rank of this process; None if it is missing or not a number.
        size: number of ranks; None if it is missing, not a number, or not set by this launcher.
        is_complete: whether all variables that this launcher sets are present.
    """

    kind: Launcher
    variables: dict[str, str]
    rank: int | None
    size: int | None
    is_complete: bool

    @property
    def launcher(self) -> str:
        """Name of the launcher, for messages."""
        return self.kind.name

    @property
    def mpi(self) -> bool:
        """Whether its ranks are MPI processes."""
        return self.kind.family is not None


def read_claims(environment: Mapping[str, str]) -> list[Claim]:
    """The claims of the launchers that count, with the innermost launcher first, and those that are incomplete.

    Args:
        environment: environment variables of the process.
    """
    claims = _all_claims(environment)
    complete = [claim for claim in claims if claim.is_complete]
    inner = [claim for claim in complete if claim.kind.is_innermost] or _inner_torch(complete, environment)
    if inner:
        return [claim for claim in claims if claim in inner or not claim.is_complete]
    if any(claim.kind.needs_both and claim.size != 1 and not is_of_step(claim, complete) for claim in complete):
        # An mpirun that starts its daemons by srun; its ranks on the other nodes inherit the daemons' variables.
        return [claim for claim in claims if not (claim.kind.is_plugin and is_of_step(claim, complete))]
    return claims


def is_of_step(claim: Claim, claims: Sequence[Claim]) -> bool:
    """Whether a claim numbers the tasks of srun's step, by srun's own variables or by those of its PMI plugin.

    Args:
        claim: one of the claims.
        claims: all of them.
    """
    place = (claim.rank, claim.size)
    steps = [(each.rank, each.size) for each in claims if each.kind.starts_launchers]
    return claim.kind.starts_launchers or (claim.is_complete and claim.kind.is_plugin and place in steps)


def has_meeting_point(environment: Mapping[str, str]) -> bool:
    """Whether the environment says where the ranks of torch.distributed meet."""
    return all(environment.get(name) for name in launchers.MEETING_POINT)


def _all_claims(environment: Mapping[str, str]) -> list[Claim]:
    claims: list[Claim] = []
    for kind in launchers.LAUNCHERS:
        names = [kind.rank, *([kind.size] if kind.size else [])]
        variables = {name: environment[name] for name in names if name in environment}
        is_meant = kind.needs_both or len(variables) == len(names)  # others set one of these variables too
        if not variables or not is_meant or (kind.marker is not None and kind.marker not in environment):
            continue
        if any(variables.items() <= claim.variables.items() for claim in claims):  # torchrun's RANK and WORLD_SIZE
            continue
        rank, size = (_number(variables.get(name)) for name in (kind.rank, kind.size or ""))
        is_complete = rank is not None and (kind.size is None or bool(size))
        claims.append(Claim(kind, variables, rank, size, is_complete))
    return claims


def _inner_torch(complete: Sequence[Claim], environment: Mapping[str, str]) -> list[Claim]:
    """The claim of a launcher of torch.distributed that another launcher, or its shell, has started on each node.

    Unlike torchrun, DeepSpeed's and others set no variable of their own: their ranks are more than those outside.
    """
    inner = next((claim for claim in complete if claim.kind.is_torch), None)
    sizes = [claim.size for claim in complete if claim is not inner and claim.size is not None]
    if inner is None or inner.size is None or not sizes or not has_meeting_point(environment):
        return []
    return [inner] if inner.size > max(sizes) and environment.get(inner.kind.local_rank or "") else []


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
