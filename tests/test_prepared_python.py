"""Processes that begin with a framework imported run a program as Python does, and end as it does."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from case_selection import selected_cases
from launchers import HOROVOD_GLOO, OPEN_MPI, TORCHRUN, Launcher
from prepared_python import prepared_python

pytestmark = pytest.mark.skipif(selected_cases(False, True), reason="make test-all starts Python itself")

DESCRIBE = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("GIVEN"), __name__, sys.stdin.read(), sys.path[:2]]))
print("to stderr", file=sys.stderr)
"""


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [*prepared_python("lentando.torch"), *arguments]
    return subprocess.run(command, check=False, text=True, capture_output=True, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    "program", [["-c", DESCRIBE], ["program.py"], ["folder"], ["-m", "program"]], ids=["-c", "script", "folder", "-m"]
)
def test_program_has_its_arguments_folder_environment_and_streams(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("program.py", "folder/__main__.py"):
        (tmp_path / name).write_text(DESCRIBE)
    options = {"cwd": tmp_path, "env": {"GIVEN": "value", "PYTHONPATH": "given"}, "input": "typed"}
    as_python = subprocess.run(
        [sys.executable, *program, "a", "b c"], text=True, capture_output=True, check=True, **options
    )
    prepared = run(*program, "a", "b c", **options)
    assert prepared.returncode == 0
    assert json.loads(prepared.stdout) == json.loads(as_python.stdout)
    assert prepared.stderr == as_python.stderr == "to stderr\n"


@pytest.mark.parametrize(
    ("ending", "status"),
    [("sys.exit(7)", 7), ("raise ValueError('why')", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -9)],
)
def test_program_ends_as_under_python(ending: str, status: int) -> None:
    ended = run("-c", f"import atexit, os, signal, sys\natexit.register(print, 'exit')\n{ending}")
    assert ended.returncode == status
    assert ended.stdout == ("" if status < 0 else "exit\n")
    assert ("ValueError: why" in ended.stderr) == ("why" in ending)


def test_framework_is_imported_once_for_all() -> None:
    assert run("-c", "import sys; print('lentando.torch' in sys.modules)").stdout == "True\n"
    started = time.process_time()
    run("-c", "import lentando.torch")
    assert time.process_time() - started < 1


def test_signals_reach_the_program_and_its_death_follows_that_of_its_client(tmp_path: Path) -> None:
    wait = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"asked to end\\n"))  # print may be what it interrupts
print(os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""
    client = subprocess.Popen([*prepared_python("lentando.torch"), "-c", wait], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    program = Path("/proc", client.stdout.readline().strip())
    client.send_signal(signal.SIGTERM)
    assert client.stdout.readline() == "asked to end\n"
    assert program.exists()
    client.kill()
    assert client.stdout.read() == ""  # the last process that could write to it has ended
    assert client.wait() == -signal.SIGKILL
    client.stdout.close()


@pytest.mark.parametrize("launcher", [OPEN_MPI, TORCHRUN, HOROVOD_GLOO], ids=lambda each: each.name)
def test_ranks_iterate_over_sets_in_different_orders(launcher: Launcher) -> None:
    program = "import sys; assert 'lentando.torch' in sys.modules; print('hash', hash('a'), flush=True)"
    job = launcher.run(2, "-c", program, prepared="lentando.torch")
    assert job.status == 0, job.output
    assert len(set(re.findall(r"hash \S+", job.output))) == 2, job.output


def test_a_signal_that_comes_when_the_program_has_ended_is_ignored() -> None:
    """As of a launcher that ends all ranks when one has failed. A busy server sees both at once."""
    command = prepared_python("lentando.torch")
    program = "import os; print(os.getpid(), flush=True); os.read(0, 1); os._exit(0)"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    network = Path("/proc/self/ns/net").stat().st_ino
    other = json.dumps({"arguments": ["-c", ""], "folder": "/", "environment": {}, "network": network}).encode()
    with subprocess.Popen([*command, "-c", program], **streams) as client, socket.socket(socket.AF_UNIX) as second:  # type: ignore[call-overload]
        status = Path(f"/proc/{int(client.stdout.readline())}/stat")
        second.connect(f"{command[-1].rpartition(':')[0]}0")
        socket.send_fds(second, [other], [0, 1, 2])
        time.sleep(0.2)  # the server now waits for the end of the request
        client.stdin.close()
        while status.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        client.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        second.sendall(b"\n")
        assert client.wait(60) == 0
        assert second.recv(4) == bytes(4)
    assert run("-c", "print('lives')").stdout == "lives\n"
