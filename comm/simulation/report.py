"""The report of a deadlock: which rank waits for what, at which line, and why that will never happen."""

from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import lentando
from lentando.comm.errors import DeadlockError
from lentando.comm.simulation.tasks import Task

__all__ = ["deadlock"]

MAX_RANKS_DESCRIBED = 8
_PACKAGE = Path(lentando.__file__).parent
_SIMULATION = _PACKAGE / "comm" / "simulation"


def deadlock(tasks: Sequence[Task]) -> DeadlockError:
    """Return the error that describes what each of the ``tasks`` that have not ended waits for."""
    stuck = [task for task in tasks if task.ended is None and task.waiting is not None]
    waits = [f"rank {task.rank} waits for {task.waiting.describe()}{_location(task)}" for task in stuck if task.waiting]
    if len(waits) > MAX_RANKS_DESCRIBED:
        waits[MAX_RANKS_DESCRIBED:] = [f"and {len(waits) - MAX_RANKS_DESCRIBED} more ranks"]
    latest = max(task.clock for task in stuck)
    return DeadlockError(
        f"deadlock at {latest:g} s: {len(stuck)} of {len(tasks)} ranks wait forever. " + "; ".join(waits)
    )


def _location(task: Task) -> str:
    """The line that called the simulator and, if that is within Lentando, the program's line that called Lentando."""
    frame: FrameType | None = task.greenlet.gr_frame
    while frame is not None and _is_in(frame, _SIMULATION):
        frame = frame.f_back
    if frame is None:
        return ""
    text = f", in {_name(frame)}"
    if _is_in(frame, _PACKAGE):
        while frame is not None and _is_in(frame, _PACKAGE):
            frame = frame.f_back
        if frame is not None:
            text += f", called by {_name(frame)}"
    return text


def _is_in(frame: FrameType, folder: Path) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(folder)


def _name(frame: FrameType) -> str:
    code = frame.f_code
    return f"{getattr(code, 'co_qualname', code.co_name)} ({Path(code.co_filename).name}:{frame.f_lineno})"
