"""What a rank looks at once more before it leaves the job: what went wrong after its last message."""

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, finalize

from lentando.comm.transport import Transport

__all__ = ["check_before_leaving", "take_problems"]


@dataclass
class _Looks:
    """Of one rank.

    Attributes:
        pending: looks that are still to come.
        found: what looks have found so far, in words.
    """

    pending: "list[finalize[..., object]]" = field(default_factory=list)
    found: list[str] = field(default_factory=list)


_looks: WeakKeyDictionary[Transport, _Looks] = WeakKeyDictionary()


def check_before_leaving(transport: Transport, owner: object, look: Callable[[], str | None]) -> None:
    """Call a function once: when its owner is dropped, or else when this rank leaves the job.

    Args:
        transport: of the job.
        owner: whose state is looked at.
        look: returns what is wrong, in words, or None. Must not refer to ``owner``, which would then never be dropped.
    """
    looks = _looks.setdefault(transport, _Looks())
    looks.pending = [pending for pending in looks.pending if pending.alive]
    found = looks.found

    def record() -> None:
        if (problem := look()) is not None:
            found.append(problem)

    pending = finalize(owner, record)
    pending.atexit = False
    looks.pending.append(pending)


def take_problems(transport: Transport) -> list[str]:
    """Look now at what has not been looked at. Returns all that was found, in words, each problem once."""
    looks = _looks.pop(transport, None)
    if looks is None:
        return []
    for pending in looks.pending:
        pending()
    return looks.found
