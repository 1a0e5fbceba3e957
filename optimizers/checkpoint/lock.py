"""The lock of a folder of checkpoints: two jobs that save there would remove each other's files."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from lentando.comm.errors import CheckpointError

__all__ = ["LOCK", "locked"]

_log = logging.getLogger("lentando")

LOCK = "checkpoint.lock"
"""Name of the file in a folder of checkpoints that is locked while a job saves there."""

HOLDER_BYTES = 200
"""How much of the lock file is read to name the holder in an error message."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of ``flock`` on file systems without locks, such as Lustre mounted without ``-o flock``."""


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder inside the block, without waiting for it.

    The kernel releases the lock however its process ends, so that a job that was killed blocks no other.

    Args:
        folder: an existing folder.

    Yields:
        Whether the lock is held. False on a file system without locks, about which one warning per process is logged.

    Raises:
        CheckpointError: if another job holds the lock; the message names that job.
        OSError: if the lock file cannot be created.
    """
    descriptor = _acquired(folder / LOCK)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        # Removed while the lock is held, so that no other job can have locked the file in the meantime. A file that
        # cannot be removed is no longer locked, and does no harm.
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may hold the descriptor as well
        os.close(descriptor)


def _acquired(file: Path) -> int | None:
    """The descriptor of the locked file, None where there are no locks."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, HOLDER_BYTES).decode(errors="replace")
            os.close(descriptor)
            raise CheckpointError(
                f"another job is saving to {file.parent}: {holder or 'one that has just started'}. Two jobs that save "
                "to one place would replace each other's checkpoints: end one of them, or make it save elsewhere"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            file.unlink(missing_ok=True)
            _warn_without_locks(file.parent, error)
            return None
        if _is_still(file, descriptor):
            with suppress(OSError):  # on a full disk the lock is held, but does not name its holder
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _holder().encode())
            return descriptor
        os.close(descriptor)  # the previous holder removed the file after it was opened here: lock the new one


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether the name still refers to the open file."""
    try:
        named = file.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


def _holder() -> str:
    """This process and job, for the error message of another job."""
    jobs = [os.environ[name] for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID") if name in os.environ]
    job = f", job {jobs[0]}" if jobs else ""
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {os.uname().nodename}{job}, since {since}"


_warned: set[str] = set()


def _warn_without_locks(folder: Path, error: OSError) -> None:
    if not _warned:
        _warned.add(str(folder))
        _log.warning(
            "the file system of %s has no file locks (%s): two jobs that save to one place at the same time are not "
            "kept apart there",
            folder,
            error.strerror,
        )
