"""Python in which a framework is imported already, because its import, of 2 to 4 s, is most of a short job.

A server (``prepared_server.py``) imports the framework and Lentando once for all tests, and forks a process for each
program; mpirun starts a small process (``prepared_client.py``) that stands for it. `make test-all`, and each test whose
subject is how a job begins or ends, starts Python itself.
"""

import atexit
import fcntl
import os
import socket
import sys
from functools import cache
from pathlib import Path
from zlib import crc32

from case_selection import selected_cases

HERE = Path(__file__).parent
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from prepared_server import serve; exec(serve())"
NUMBER = 2
"""Servers for each framework, which differ in the order in which they iterate over sets of strings."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
"""What the frameworks read when they are imported."""
TRAINERS = "lentando.torch,lightning,transformers.trainer"
"""Modules for examples that train with Lightning or Transformers."""


@cache
def prepared_python(modules: str) -> list[str]:
    """The beginning of a command that runs a script, ``-c CODE`` or ``-m MODULE`` with modules imported.

    The modules are ``lentando.torch``, for instance, or several with commas between them.
    """
    if selected_cases(False, True):
        return [sys.executable]
    folder = _folder()
    address = str(folder / f"{crc32(modules.encode()):08x}-")
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for number in range(NUMBER):
        if not _connected(f"{address}{number}"):
            _start(f"{address}{number}", modules)
            assert _connected(f"{address}{number}")
    os.close(lock)
    return [sys.executable, "-S", str(HERE / "prepared_client.py"), f"{address}:{NUMBER}"]


@cache
def _folder() -> Path:
    """A folder in which only this user can connect to the servers, the same for all processes that run the tests."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
    folder = Path("/tmp", f"lentando-{run}")  # the path of a socket must be short
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to another user"
    return folder


_connections: list[socket.socket] = []
"""The servers end when the last of the processes that run the tests has ended."""
atexit.register(lambda: [connection.close() for connection in _connections])


def _connected(address: str) -> bool:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return False
    _connections.append(connection)
    return True


def _start(address: str, modules: str) -> None:
    Path(address).unlink(missing_ok=True)  # of a server that was killed
    reading, writing = os.pipe()
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", START, str(HERE), address, modules],
        {**os.environ, **ENVIRONMENT},
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, writing, 1)],
        setsid=True,  # other processes that run tests may need it for longer than this one
    )
    os.close(writing)
    with os.fdopen(reading, "rb") as output:
        assert output.readline() == b"ready\n", f"no process that has imported {modules}: see above"
