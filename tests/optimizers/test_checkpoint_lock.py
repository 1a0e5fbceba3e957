"""One job at a time saves to a folder, whatever becomes of it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lentando.comm.errors import CheckpointError
from lentando.optimizers.checkpoint.lock import LOCK, locked

HOLDER = """
import sys, time
from pathlib import Path
from lentando.optimizers.checkpoint.lock import locked
with locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def start_holder(folder: Path) -> "subprocess.Popen[str]":
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    return holder


def test_lock_leaves_nothing_and_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path) as held:
            assert held
            assert f"process {os.getpid()} on {os.uname().nodename}" in (tmp_path / LOCK).read_text()
        assert not list(tmp_path.iterdir())


def test_another_holder_is_named_and_loses_the_lock_when_it_is_killed(tmp_path: Path) -> None:
    with start_holder(tmp_path) as holder:
        with pytest.raises(CheckpointError, match=rf"another job is saving to {tmp_path}: process {holder.pid} on "):
            locked(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()  # left by the killed process, but no longer locked
    with locked(tmp_path) as held:
        assert held
    assert not list(tmp_path.iterdir())


def test_lock_is_released_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path) as held:
        assert held


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    try:
        with locked(tmp_path) as held:
            assert held
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)


def test_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("precious")
    (tmp_path / LOCK).symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        locked(tmp_path).__enter__()
    assert target.read_text() == "precious"


def test_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in for ``flock``: no such file system can be mounted in a test."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with locked(tmp_path) as held:
            assert not held
    (record,) = caplog.records
    stated = (
        "has no file locks (No locks available): two jobs that save to one place at the same time are not kept apart"
    )
    assert record.message == f"the file system of {tmp_path} {stated} there"
